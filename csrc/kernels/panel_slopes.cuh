// The products of a direction with the rows of a panel; the momentum's buffer takes the gradient in
// on the way. A tile of the rows is in shared memory, with u as one more.
//
//   panel_slopes<T, P, kMomentum>   any grid of kThreads, a launch per table of for_each_table with
//                                   chunks of kSlopesLength<T>; partial: [blocks, k]
//   project_finish                  (project_finish.cuh) partial, all launches' rows, to the k sums
//   (rows = k − 1)
#pragma once

#include "direction.cuh"
#include "project_finish.cuh"

namespace lyapcuda::kernels {

constexpr int kSlopesRows = 33;  // those of the panel, and u

template <class T>
constexpr int kSlopesLength = Tile<T, kSlopesRows>::kLength;

template <class T>
struct PanelSlopesArguments {
  const T* panel;
  int64_t n;
  int k;
  T* buffer;
  const double *state, *factor;
  double weight_decay, momentum;
  double* partial;
};

template <class T, class P, Momentum kMomentum>
__global__ void __launch_bounds__(kThreads, 4)
    panel_slopes(const __grid_constant__ DirectionSegments<P> table,
                 const __grid_constant__ PanelSlopesArguments<T> a) {
  constexpr int kLength = kSlopesLength<T>, kMine = (kSlopesRows - 1 + kWarps - 1) / kWarps;
  using Memory = Tile<T, kSlopesRows>;
  LYAPCUDA_SHARED(Memory, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Newton newton{a.state, a.k, 1.0, 1.0};
  const int rows = newton.has_vectors() ? a.k : 0;
  const bool go = newton.go(factor_of(a.factor)) && (rows != 0 || kMomentum != Momentum::kNone);
  const Direction<T, kMomentum> direction{static_cast<T>(a.weight_decay),
                                          static_cast<T>(a.momentum)};
  const bool aligned = rows_aligned16(a.panel, a.n, a.k);
  double sums[kMine] = {};
  const int64_t tiles = go ? table.first_chunk[table.count] : 0;
  int segment = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    segment = segment_of(table, tile, segment);
    const int64_t begin = (tile - table.first_chunk[segment]) * kLength;
    const int64_t at = table.offset[segment] + begin, left = table.size[segment] - begin;
    const int length = left < kLength ? static_cast<int>(left) : kLength;
    const int e = threadIdx.x;
    if (e < kLength) {
      T u = 0;
      if (e < length) {
        T held = 0;
        if constexpr (kMomentum != Momentum::kNone) held = a.buffer[at + e];
        u = direction.template of<true>(widen(table.data[0][segment][begin + e]),
                                        widen(table.data[1][segment][begin + e]), held);
        if constexpr (kMomentum != Momentum::kNone) a.buffer[at + e] = held;
      }
      memory.row(kSlopesRows - 1)[e] = u;
    }
    const bool wide = aligned && length == kLength && at % kGroup<T> == 0;
    stage<kThreads>(memory, 0, a.panel, a.n, rows, at, length, wide);
    __syncthreads();
    constexpr int kStrips = kLength / 32;
    T u[kStrips];
    LYAPCUDA_UNROLL
    for (int s = 0; s < kStrips; ++s) u[s] = memory.row(kSlopesRows - 1)[s * 32 + lane];
    LYAPCUDA_UNROLL
    for (int m = 0; m < kMine; ++m) {
      const int row = warp + m * kWarps;
      if (row < rows) {
        LYAPCUDA_UNROLL
        for (int s = 0; s < kStrips; ++s) {
          accumulate(sums[m], memory.row(row)[s * 32 + lane], u[s]);
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
    if (lane == 0 && row < a.k) a.partial[int64_t{blockIdx.x} * a.k + row] = sums[m];
  }
}

}  // namespace lyapcuda::kernels
