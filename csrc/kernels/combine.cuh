// out_j = Σ_i panel_i·T(matrix[i][j]); out may start at the panel's own memory, with no more rows.
//
//   combine<T, kRows>  any grid of kThreads, up to ceil(n / kTransformLength<T, kRows>) of use;
//                      kRows: 32 where neither panel has more rows, else 128
#pragma once

#include "panel_transform.cuh"

namespace lyapcuda::kernels {

template <class T>
struct CombineArguments {
  T* out;
  const T* panel;
  int64_t n;             // elements of a row
  int rows, columns;     // rows of panel, of out
  const double* matrix;  // (rows, columns)
  const double* gate;    // may be null; closed: out stays
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 4)
    combine(const __grid_constant__ CombineArguments<T> a) {
  using Work = Transform<T, kRows>;
  constexpr int kLength = kTransformLength<T, kRows>;
  LYAPCUDA_SHARED(typename Work::Memory, memory);
  if (!is_open(a.gate)) return;
  Work work(memory, a.matrix, a.rows, a.columns);
  if (work.staged_whole()) work.stage_matrix(0);
  const bool aligned =
      rows_aligned16(a.panel, a.n, a.rows) && rows_aligned16(a.out, a.n, a.columns);
  const int64_t tiles = (a.n + kLength - 1) / kLength;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kLength, left = a.n - begin;
    const int length = left < kLength ? static_cast<int>(left) : kLength;
    const bool wide = aligned && length == kLength;
    stage<kThreads>(memory.tile, 0, a.panel, a.n, a.rows, begin, length, wide);
    work.apply([&](int j, int e, const T(&values)[Work::kStep]) {
      T* const to = a.out + j * a.n + begin + e;
      if (wide) {
        store(to, values);
      } else {
        LYAPCUDA_UNROLL
        for (int k = 0; k < Work::kStep; ++k) {
          if (e + k < length) to[k] = values[k];
        }
      }
    });
    __syncthreads();
  }
}

}  // namespace lyapcuda::kernels
