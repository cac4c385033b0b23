// Products of 8×4 by 4×8 tiles in double on the tensor cores (sm_80 and later): a value loaded and
// widened once serves eight products, where one per product would keep the conversions busier than
// memory is. Fused, to nearest, as fma(); in which order the four are added is the processor's,
// always the same.
#pragma once

#include "../simt/simt.h"

namespace lyapcuda::kernels {

// Lane l holds element (l / 4, l % 4) of each 8×4 tile: of A_i in a[i], of B_jᵀ in b[j], so that a
// matrix times its own transpose needs each tile once. Of the 8×8 products it holds elements (l /
// 4, 2·(l % 4) + c) in sums[i][j][c]. Adds A_i·B_j for i < kRows, j < kColumns, where kUpper i <= j
// alone. A whole warp calls it.
#ifdef __CUDACC__

__device__ __forceinline__ void multiply_add(double (&sums)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sums[0]), "+d"(sums[1])
               : "d"(a), "d"(b));
}

// Two tiles, one above the other: one instruction from sm_90 on.
__device__ __forceinline__ void multiply_add(double (&upper)[2], double (&lower)[2], double a_upper,
                                             double a_lower, double b) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
      : "d"(a_upper), "d"(a_lower), "d"(b));
#else
  multiply_add(upper, a_upper, b);
  multiply_add(lower, a_lower, b);
#endif
}

template <bool kUpper, int kRows, int kColumns>
__device__ __forceinline__ void multiply_add(double (&sums)[4][4][2], const double (&a)[4],
                                             const double (&b)[4]) {
  LYAPCUDA_UNROLL
  for (int j = 0; j < kColumns; ++j) {
    const int rows = kUpper && j + 1 < kRows ? j + 1 : kRows;
    LYAPCUDA_UNROLL
    for (int i = 0; i + 1 < rows; i += 2) {
      multiply_add(sums[i][j], sums[i + 1][j], a[i], a[i + 1], b[j]);
    }
    if (rows % 2 != 0) multiply_add(sums[rows - 1][j], a[rows - 1], b[j]);
  }
}

#else

template <bool kUpper, int kRows, int kColumns>
void multiply_add(double (&sums)[4][4][2], const double (&a)[4], const double (&b)[4]) {
  uint64_t words[kRows + kColumns];
  static_assert(kRows + kColumns <= static_cast<int>(simt::kMostWords));
  std::memcpy(words, a, kRows * sizeof(double));
  std::memcpy(words + kRows, b, kColumns * sizeof(double));
  unsigned lane = 0;
  const simt::Lanes* const tiles =
      simt::exchange(0xffffffffu, simt::Collective::kMultiply, kUpper * 100 + kRows * 10 + kColumns,
                     words, kRows + kColumns, lane);
  const auto element = [&](int tile, unsigned row, unsigned k) {
    double value;
    std::memcpy(&value, &tiles[tile][row * 4 + k], sizeof(value));
    return value;
  };
  for (int i = 0; i < kRows; ++i) {
    for (int j = kUpper ? i : 0; j < kColumns; ++j) {
      for (unsigned c = 0; c < 2; ++c) {
        for (unsigned k = 0; k < 4; ++k) {
          sums[i][j][c] = std::fma(element(i, lane / 4, k), element(kRows + j, lane % 4 * 2 + c, k),
                                   sums[i][j][c]);
        }
      }
    }
  }
}

#endif

}  // namespace lyapcuda::kernels
