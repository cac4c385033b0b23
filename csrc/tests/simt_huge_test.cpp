// Panels of more than 2³¹ elements a row: the last tiles alone, of memory that is mapped but never
// touched elsewhere.
#include <sys/mman.h>

#include "../kernels/panel_ascent.cuh"
#include "../kernels/panel_recenter.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using simt::Order;

constexpr int64_t kRow = (int64_t{1} << 31) + 40;  // elements
constexpr int64_t kTouched = 40 + 128;             // of each row's end

// Zeros, which take no memory until they are written.
class Mapped {
 public:
  explicit Mapped(int rows) : bytes_(rows * kRow * sizeof(float)) {
    void* const at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = at == MAP_FAILED ? nullptr : static_cast<float*>(at);
    for (int j = 0; j < rows && data_ != nullptr; ++j) {
      for (int64_t i = kRow - kTouched; i < kRow; ++i) {
        data_[j * kRow + i] = static_cast<float>(random_number());
      }
    }
  }
  ~Mapped() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  float* data() { return data_; }
  float at(int j, int64_t i) const { return data_[j * kRow + i]; }

 private:
  size_t bytes_;
  float* data_;
};

// As if all tiles but the last two had been dealt.
template <class Table>
void last_two(Table& table) {
  table.first_chunk[0] = 2 - table.first_chunk[1];
  table.first_chunk[1] = 2;
}

void panels_have_64_bits() {
  Mapped q(2), g1(2), g0(1), d(2);
  if (!CHECK(q.data() != nullptr && g1.data() != nullptr && g0.data() != nullptr &&
             d.data() != nullptr)) {
    return;
  }
  const float* const of_g0 = g0.data();
  const float* const* const lists[2] = {&of_g0, &of_g0};
  const double beta = 0.5;
  std::vector<double> partial(kernels::gram_row(1));
  kernels::for_each_table(
      lists, &kRow, nullptr, 1,
      [&](kernels::PanelAscentSegments<float> table) {
        last_two(table);
        simt::launch(1, kernels::panel_threads(32), Order::kForward,
                     kernels::panel_ascent<float, float, false, false, 32>, table,
                     kernels::PanelAscentArguments<float, float>{d.data(), q.data(), g1.data(),
                                                                 nullptr, nullptr, kRow, 2, &beta,
                                                                 1.0, 0.25f, 0.0f, partial.data()});
      },
      kernels::kPanelLength<float, 32>);
  bool right = true;
  for (int j = 0; j < 2; ++j) {
    for (int64_t i = kRow - kTouched; i < kRow; ++i) {
      const float y = (g1.at(j, i) - g0.at(0, i)) + 0.25f * q.at(j, i);
      right = right && d.at(j, i) == q.at(j, i) + 0.5f * y;
    }
  }
  CHECK(right);

  // q ← d·transform, the copies in g1's memory.
  const double transform[4] = {0.5, -2.0, 1.5, 3.0}, pending = 1.0;
  kernels::for_each_table(
      {&of_g0}, &kRow, nullptr, 1,
      [&](kernels::PanelRecenterSegments<float> table) {
        last_two(table);
        simt::launch(1, kernels::kThreads, Order::kReverse,
                     kernels::panel_recenter<float, float, 32>, table,
                     kernels::PanelRecenterArguments<float, float>{q.data(), g1.data(), d.data(),
                                                                   kRow, 2, transform, &pending});
      },
      kernels::kTransformLength<float, 32>);
  right = true;
  for (int j = 0; j < 2; ++j) {
    for (int64_t i = kRow - kTouched; i < kRow; ++i) {
      const float next = d.at(0, i) * static_cast<float>(transform[j]) +
                         d.at(1, i) * static_cast<float>(transform[2 + j]);
      right = right && q.at(j, i) == next && g1.at(j, i) == g0.at(0, i) + next;
    }
  }
  CHECK(right);
}

}  // namespace

void simt_huge_tests() { panels_have_64_bits(); }

}  // namespace lyapcuda::test
