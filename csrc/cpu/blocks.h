// The work of an op over a list of tensors, cut into blocks of fixed length. The cut depends on the
// sizes alone, never on the number of threads, so sums come out the same on any of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lyapcuda::cpu {

constexpr int64_t kBlock = 16384;      // elements: 64 KiB of fp32, well inside a core's cache
constexpr int64_t kBlocksPerTask = 2;  // below that, waking another thread costs more than it saves
constexpr int64_t kAroundCache = 1 << 21;  // outputs of more elements than this bypass the cache

class Blocks {
 public:
  explicit Blocks(const std::vector<int64_t>& sizes) : first_(1, 0), sizes_(sizes) {
    for (int64_t size : sizes) {
      first_.push_back(first_.back() + (size + kBlock - 1) / kBlock);
      elements_ += size;
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t elements() const { return elements_; }

  // f(segment, begin, length, block) for every block, in parallel on torch's own threads.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count(), kBlocksPerTask, [&](int64_t from, int64_t to) {
      auto segment = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
      for (int64_t block = from; block < to; ++block) {
        while (block >= first_[segment + 1]) ++segment;
        const int64_t begin = (block - first_[segment]) * kBlock;
        f(segment, begin, std::min(kBlock, sizes_[segment] - begin), block);
      }
    });
  }

 private:
  std::vector<int64_t> first_;  // first_[s]: the first block of segment s
  std::vector<int64_t> sizes_;
  int64_t elements_ = 0;
};

// The pairwise sum of count rows of `width` numbers, in place; row 0 holds the result.
inline void tree_sum(double* rows, int64_t count, int64_t width) {
  for (int64_t step = 1; step < count; step *= 2) {
    for (int64_t row = 0; row + step < count; row += 2 * step) {
      for (int64_t i = 0; i < width; ++i) rows[row * width + i] += rows[(row + step) * width + i];
    }
  }
}

}  // namespace lyapcuda::cpu
