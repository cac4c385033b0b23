// The next separations, q_j = Σ_i d_i·T(transform[i][j]) where a transform is pending, and the
// copies at θ + q_j, with a metric S at θ + displacement_j·S·q_j, rounded to storage.
//
//   panel_recenter<T, P, kMetric, kRows>   any grid of kThreads, a launch per table of
//                                          for_each_table with chunks of
//                                          kTransformLength<T, kRows> (list: θ)
//
// kRows: the first of 8, 16, 32 that k fits in.
#pragma once

#include "panel_transform.cuh"

namespace lyapcuda::kernels {

template <class T, class P>
struct PanelRecenterArguments {
  T* q;
  P* copies;  // may be d's memory: a tile's d's are in shared memory before any of its copies is
              // written
  const T* d;
  const T* metric;  // shared by all rows
  int64_t n;        // elements of a row of q, copies, d
  int k;
  const double *transform, *pending, *displacement;  // in the panel's state
};

template <class P>
using PanelRecenterSegments = Segments<P, 1>;  // θ

template <class T, class P, bool kMetric, int kRows>
struct PanelRecenterMemory {
  typename Transform<T, kRows>::Memory transform;
  alignas(16) P theta[kSlots<kRows>][kTransformLength<T, kRows>];
  alignas(16) T metric[kSlots<kRows>][kMetric ? kTransformLength<T, kRows> : kGroup<T>];
};

// Blocks that a multiprocessor is to hold, as registers allow.
template <class T, class P, bool kMetric>
constexpr int kRecenterBlocks =
    sizeof(T) != sizeof(P) || (kMetric && sizeof(T) == sizeof(double)) ? 3 : 4;

template <class T, class P, bool kMetric, int kRows>
__global__ void __launch_bounds__(kThreads, kRecenterBlocks<T, P, kMetric>)
    panel_recenter(const __grid_constant__ PanelRecenterSegments<P> table,
                   const __grid_constant__ PanelRecenterArguments<T, P> a) {
  using Work = Transform<T, kRows>;
  using Memory = PanelRecenterMemory<T, P, kMetric, kRows>;
  constexpr int kLength = kTransformLength<T, kRows>, kStep = Work::kStep;
  LYAPCUDA_SHARED(Memory, memory);
  const bool pending = *a.pending != 0.0;
  const T* const from = pending ? a.d : a.q;
  Work work(memory.transform, a.transform, a.k, a.k);
  if (pending) work.stage_matrix(0);
  const bool aligned = rows_aligned16(a.q, a.n, a.k) && rows_aligned16(a.d, a.n, a.k) &&
                       rows_aligned16(a.copies, a.n, a.k) && (!kMetric || aligned16(a.metric));
  int segment = 0;
  const auto fill = [&](int64_t tile, int slot) {
    segment = segment_of(table, tile, segment);
    const SegmentPlace place = place_in<kLength>(table, segment, tile, aligned);
    const P* const theta = table.data[0][segment] + place.inside;
    stage<kThreads>(memory.transform.tiles[slot], 0, from, a.n, a.k, place);
    for (int e = threadIdx.x * kGroup<P>; e < kLength; e += kThreads * kGroup<P>) {
      start_copy<kGroup<P>>(memory.theta[slot] + e, theta + e, place.length - e, place.aligned);
    }
    for (int e = threadIdx.x * kStep; kMetric && e < kLength; e += kThreads * kStep) {
      start_copy<kStep>(memory.metric[slot] + e, a.metric + place.begin + e, place.length - e,
                        place.aligned);
    }
    return place;
  };
  const auto recenter = [&](const SegmentPlace& place, int slot) {
    const auto write = [&](int j, int e, const T(&values)[kStep]) {
      const int64_t at = j * a.n + place.begin + e;
      Pack<T, kStep> theta, moved;
      load_part(theta.of, memory.theta[slot] + e);
      LYAPCUDA_UNROLL
      for (int i = 0; i < kStep; ++i) moved.of[i] = values[i];
      if constexpr (kMetric) {
        Pack<T, kStep> metric;
        get(metric.of, memory.metric[slot] + e);
        moved = displaced(moved, metric, static_cast<T>(a.displacement[j]));
      }
      moved = theta + moved;
      if (pending) store_some(a.q + at, values, place.length - e, place.aligned);
      store_some(a.copies + at, moved.of, place.length - e, place.aligned);
    };
    const auto& tile = memory.transform.tiles[slot];
    if (pending) {
      work.apply(tile, write);
      return;
    }
    __syncthreads();
    for (int item = threadIdx.x; item < a.k * Work::kGroups; item += kThreads) {
      const int j = item / Work::kGroups, e = item % Work::kGroups * kStep;
      T values[kStep];
      get(values, tile.row(j) + e);
      write(j, e, values);
    }
  };
  for_each_tile<kSlots<kRows>>(table.first_chunk[table.count], fill, recenter);
}

}  // namespace lyapcuda::kernels
