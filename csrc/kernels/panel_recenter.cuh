// The next separations, q_j = Σ_i d_i·T(transform[i][j]) where a transform is pending, and the
// copies at θ + q_j, rounded to storage; the arithmetic is that of cpu/panel_recenter.inc, to the
// bit.
//
//   panel_recenter<T, P>   any grid of kThreads, a launch per table of for_each_table with chunks
//                          of kTransformLength<T, kMaxRecenter> (list: θ)
#pragma once

#include "panel_transform.cuh"

namespace lyapcuda::kernels {

constexpr int kMaxRecenter = 32;  // separations

template <class T, class P>
struct PanelRecenterArguments {
  T* q;
  P* copies;  // may be d's memory: a tile's d's are in shared memory before any of its copies is
              // written
  const T* d;
  int64_t n;  // elements of a row of q, copies, d
  int k;
  const double *transform, *pending;  // in the panel's state
};

template <class P>
using PanelRecenterSegments = Segments<const P, 1>;  // θ

template <class T, class P>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(P) ? 4 : 3)
    panel_recenter(const __grid_constant__ PanelRecenterSegments<P> table,
                   const __grid_constant__ PanelRecenterArguments<T, P> a) {
  using Work = Transform<T, kMaxRecenter>;
  constexpr int kLength = kTransformLength<T, kMaxRecenter>, kStep = Work::kStep;
  LYAPCUDA_SHARED(typename Work::Memory, memory);
  const bool pending = *a.pending != 0.0;
  const T* const from = pending ? a.d : a.q;
  Work work(memory, a.transform, a.k, a.k);
  if (pending) work.stage_matrix(0);
  const bool aligned = rows_aligned16(a.q, a.n, a.k) && rows_aligned16(a.d, a.n, a.k) &&
                       rows_aligned16(a.copies, a.n, a.k);
  const int64_t tiles = table.first_chunk[table.count];
  int segment = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    segment = segment_of(table, tile, segment);
    const int64_t inside = (tile - table.first_chunk[segment]) * kLength;
    const int64_t left = table.size[segment] - inside;
    const int64_t begin = table.offset[segment] + inside;
    const int length = left < kLength ? static_cast<int>(left) : kLength;
    const P* const theta = table.data[0][segment] + inside;
    const bool wide =
        aligned && length == kLength && table.offset[segment] % kGroup<P> == 0 && aligned16(theta);
    stage<kThreads>(memory.tile, 0, from, a.n, a.k, begin, length, wide);
    const auto write = [&](int j, int e, const T(&values)[kStep]) {
      const int64_t at = j * a.n + begin + e;
      if (wide) {
        T moved[kStep];
        load_part(moved, theta + e);
        LYAPCUDA_UNROLL
        for (int i = 0; i < kStep; ++i) moved[i] += values[i];
        if (pending) store(a.q + at, values);
        store_part(a.copies + at, moved);
      } else {
        LYAPCUDA_UNROLL
        for (int i = 0; i < kStep; ++i) {
          if (e + i >= length) continue;
          if (pending) a.q[at + i] = values[i];
          narrow(widen(theta[e + i]) + values[i], a.copies[at + i]);
        }
      }
    };
    if (pending) {
      work.apply(write);
    } else {
      __syncthreads();
      for (int item = threadIdx.x; item < a.k * Work::kGroups; item += kThreads) {
        const int j = item / Work::kGroups, e = item % Work::kGroups * kStep;
        T values[kStep];
        get(values, memory.tile.row(j) + e);
        write(j, e, values);
      }
    }
    __syncthreads();
  }
}

}  // namespace lyapcuda::kernels
