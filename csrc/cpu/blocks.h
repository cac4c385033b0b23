// The work of an op over a list of tensors, cut into blocks of fixed length. The cut depends on the
// sizes alone, never on the number of threads, so sums come out the same on any of them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lyapcuda::cpu {

constexpr int64_t kBlock = 16384;      // elements: 64 KiB of fp32, well inside a core's cache
constexpr int64_t kPanelBlock = 4096;  // ... where several rows of a panel are worked on at once
constexpr int64_t kRuns = 64;          // how many parts a panel's Gram matrix is summed in, at most
constexpr int64_t kBlocksPerTask = 2;  // below that, waking another thread costs more than it saves
constexpr int64_t kAroundCache = 1 << 21;  // outputs of more elements than this bypass the cache

class Blocks {
 public:
  explicit Blocks(const std::vector<int64_t>& sizes, int64_t length = kBlock)
      : first_(1, 0), sizes_(sizes), length_(length) {
    for (int64_t size : sizes) {
      first_.push_back(first_.back() + (size + length - 1) / length);
      elements_ += size;
    }
  }

  int64_t count() const { return first_.back(); }
  int64_t elements() const { return elements_; }

  // f(segment, begin, length, block) for every block, in parallel on torch's own threads.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count(), kBlocksPerTask,
                                [&](int64_t from, int64_t to) { visit(from, to, f); });
  }

  // Consecutive blocks are dealt in `runs`, each of which one thread goes through in order.
  int64_t runs() const { return (count() + blocks_per_run() - 1) / blocks_per_run(); }

  // f(run, visit) for every run, in parallel; visit(g) calls g(segment, begin, length, block) for
  // its blocks in order. `rows`: how many rows share the work of a block.
  template <class F>
  void for_each_run(int64_t rows, const F& f) const {
    const int64_t per_run = blocks_per_run(), all = count();
    const int64_t worth_a_thread = kBlock * kBlocksPerTask / (length_ * rows * per_run);
    torch::stable::parallel_for(0, runs(), std::max<int64_t>(worth_a_thread, 1),
                                [&](int64_t from, int64_t to) {
                                  for (int64_t run = from; run < to; ++run) {
                                    f(run, [&, run](const auto& g) {
                                      visit(run * per_run, std::min(all, (run + 1) * per_run), g);
                                    });
                                  }
                                });
  }

 private:
  int64_t blocks_per_run() const { return std::max<int64_t>((count() + kRuns - 1) / kRuns, 1); }

  template <class F>
  void visit(int64_t from, int64_t to, const F& f) const {
    auto segment = std::upper_bound(first_.begin(), first_.end(), from) - first_.begin() - 1;
    for (int64_t block = from; block < to; ++block) {
      while (block >= first_[segment + 1]) ++segment;
      const int64_t begin = (block - first_[segment]) * length_;
      f(segment, begin, std::min(length_, sizes_[segment] - begin), block);
    }
  }

  std::vector<int64_t> first_;  // first_[s]: the first block of segment s
  std::vector<int64_t> sizes_;
  int64_t length_;
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

// Copies what lies below the diagonal above it.
inline void mirror(double* matrix, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = i + 1; j < size; ++j) matrix[i * size + j] = matrix[j * size + i];
  }
}

}  // namespace lyapcuda::cpu
