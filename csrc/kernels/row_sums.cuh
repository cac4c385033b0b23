// The products of a tile's rows with one of them, in double.
#pragma once

#include "panel.cuh"

namespace lyapcuda::kernels {

// Added up over all tiles of a block; a warp takes every kWarps-th row.
template <class T, int kRows>
struct RowSums {
  static constexpr int kMine = (kRows + kWarps - 1) / kWarps;
  static constexpr int kStrips = Tile<T, kRows>::kLength / 32;
  static_assert(kStrips * 32 == Tile<T, kRows>::kLength);

  double sums[kMine] = {};

  // Of the first `rows` rows; the tile is whole, `by` one of its rows.
  __device__ __forceinline__ void add(const Tile<T, kRows>& tile, int rows, int by) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    T other[kStrips];
    LYAPCUDA_UNROLL
    for (int s = 0; s < kStrips; ++s) other[s] = tile.row(by)[s * 32 + lane];
    LYAPCUDA_UNROLL
    for (int m = 0; m < kMine; ++m) {
      const int row = warp + m * kWarps;
      if (row >= rows) continue;
      LYAPCUDA_UNROLL
      for (int s = 0; s < kStrips; ++s) {
        accumulate(sums[m], tile.row(row)[s * 32 + lane], other[s]);
      }
    }
  }

  // Writes the block's row of `rows` partial sums.
  __device__ __forceinline__ void finish(double* partial, int rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    LYAPCUDA_UNROLL
    for (int m = 0; m < kMine; ++m) {
      LYAPCUDA_UNROLL
      for (unsigned delta = 16; delta > 0; delta /= 2) {
        sums[m] += __shfl_down_sync(0xffffffffu, sums[m], delta);
      }
      const int row = warp + m * kWarps;
      if (lane == 0 && row < rows) partial[int64_t{blockIdx.x} * rows + row] = sums[m];
    }
  }
};

}  // namespace lyapcuda::kernels
