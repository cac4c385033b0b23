// w −= Σ_i T(c_i)·v_i, i ascending, and the products of the new w with every v_i and itself, in one
// pass over v: a tile of v stays in shared memory between the two. The arithmetic of w is that of
// cpu/project.inc, to the bit.
//
//   project<T, kRows>   any grid of kThreads, up to ceil(n / kProjectLength<T, kRows>) of use;
//   kRows:
//                       32 up to 31 rows of v, else 129; partial: [blocks, rows + 1]
//   project_finish      (project_finish.cuh) partial to the rows + 1 sums
#pragma once

#include "project_finish.cuh"

namespace lyapcuda::kernels {

template <class T>
struct ProjectArguments {
  T* w;
  const T* v;
  int64_t n;
  int rows;  // of v, may be 0
  const double* coefficients;
  double* partial;
};

template <class T, int kRows>
constexpr int kProjectLength = Tile<T, kRows>::kLength;

template <class T, int kRows>
struct ProjectMemory {
  Tile<T, kRows> tile;  // v, then the new w
  T coefficients[kRows];
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows <= 32 ? 5 : 3)
    project(const __grid_constant__ ProjectArguments<T> a) {
  constexpr int kLength = kProjectLength<T, kRows>, kMine = (kRows + kWarps - 1) / kWarps;
  using Memory = ProjectMemory<T, kRows>;
  LYAPCUDA_SHARED(Memory, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < a.rows; i += kThreads) {
    memory.coefficients[i] = static_cast<T>(a.coefficients[i]);
  }
  const bool aligned = rows_aligned16(a.v, a.n, a.rows);
  const int64_t tiles = (a.n + kLength - 1) / kLength;
  double sums[kMine] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kLength, left = a.n - begin;
    const int length = left < kLength ? static_cast<int>(left) : kLength;
    const int e = threadIdx.x;
    T w = 0;
    if (e < length) w = a.w[begin + e];
    stage<kThreads>(memory.tile, 0, a.v, a.n, a.rows, begin, length, aligned && length == kLength);
    __syncthreads();
    if (e < kLength) {
      const T* const column = memory.tile.data + e;
      LYAPCUDA_UNROLL_BY(4)
      for (int i = 0; i < a.rows; ++i) {
        w -= product(memory.coefficients[i], column[i * memory.tile.kStride]);
      }
      if (e < length) a.w[begin + e] = w;
      memory.tile.row(a.rows)[e] = w;
    }
    __syncthreads();
    constexpr int kStrips = (kLength + 31) / 32;
    T new_w[kStrips];
    LYAPCUDA_UNROLL
    for (int s = 0; s < kStrips; ++s) new_w[s] = memory.tile.row(a.rows)[s * 32 + lane];
    LYAPCUDA_UNROLL
    for (int m = 0; m < kMine; ++m) {
      const int row = warp + m * kWarps;
      if (row <= a.rows) {
        LYAPCUDA_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          accumulate(sums[m], memory.tile.row(row)[s * 32 + lane], new_w[s]);
        }
      }
    }
    __syncthreads();
  }
  LYAPCUDA_UNROLL
  for (int m = 0; m < kMine; ++m) {
    LYAPCUDA_UNROLL
    for (unsigned delta = 16; delta > 0; delta /= 2) {
      sums[m] += __shfl_down_sync(0xffffffffu, sums[m], delta);
    }
    const int row = warp + m * kWarps;
    if (lane == 0 && row <= a.rows) {
      a.partial[int64_t{blockIdx.x} * (a.rows + 1) + row] = sums[m];
    }
  }
}

}  // namespace lyapcuda::kernels
