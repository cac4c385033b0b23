// ascent + exponent + recenter at a frozen θ in one cooperative launch: d stays in shared memory
// across the barrier of the grid, so q, g0 and g1 are read once, q and θ1 are written once.
//
//   lyapunov_step<T, P, kRealised>   cooperative, grid of as many blocks of kThreads as fit the
//                       device at once (4 a multiprocessor on sm_90, 3 on sm_80: ask the runtime);
//                       one table of for_each_table with chunks of kStepChunk<P> (lists: θ1, g0,
//                       g1, θ), for which step_fits(); rows: [blocks, kSumSize]
//
// Elements are those of the three kernels to the bit, given the same scale. The sums are cut
// otherwise, by this grid, so that they, and with them λ and the scale, may differ in the last
// digits from what three kernels find; for the same grid they are always the same.
#pragma once

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

#include "../exponent.h"
#include "ascent.cuh"
#include "panel.cuh"

namespace lyapcuda::kernels {

template <class P>
constexpr int kStepChunk = kThreads * kGroup<P>;  // a group a thread
template <class T, class P>
constexpr int kStepHeld = 45056 / (kStepChunk<P> * int{sizeof(T)});  // chunks that a block holds

// Whether a table with so many chunks fits so many blocks.
template <class T, class P>
constexpr bool step_fits(int64_t chunks, int64_t blocks) {
  return chunks <= blocks * kStepHeld<T, P>;
}
// Elements that fit at most: in segments of whole chunks.
template <class T, class P>
constexpr int64_t step_capacity(int64_t blocks) {
  return blocks * kStepHeld<T, P> * kStepChunk<P>;
}

template <class T>
struct StepArguments {
  T* q;           // flat
  double* state;  // kStateSize
  const double* losses;
  int64_t loss_count;
  ExponentOptions options;
  double weight_decay;
  double* rows;
};

template <class P>
using StepSegments = Segments<P, 4>;  // θ1 (may be g1's memory), g0, g1, θ

template <class T, class P>
struct StepMemory {
  alignas(16) T d[kStepHeld<T, P> * kStepChunk<P>];
  double state[kStateSize];
};

// Calls visit.group<N>(segment, i, held) for each of this thread's groups: element i of the segment
// on, `held` in the block's memory.
template <class T, class P, class Visit>
__device__ __forceinline__ void for_each_held(const StepSegments<P>& table, const Visit& visit) {
  constexpr int N = kGroup<P>;
  const int64_t chunks = table.first_chunk[table.count];
  int segment = 0, held = static_cast<int>(threadIdx.x) * N;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    while (chunk >= table.first_chunk[segment + 1]) ++segment;
    const int64_t i = (chunk - table.first_chunk[segment]) * kStepChunk<P> + threadIdx.x * N;
    const int64_t left = table.size[segment] - i;
    if (left > 0) visit(segment, i, left < N ? static_cast<int>(left) : N, held);
    held += kStepChunk<P>;
  }
}

template <class T, class P, bool kRealised>
__global__ void __launch_bounds__(kThreads, 4)
    lyapunov_step(const __grid_constant__ StepSegments<P> table,
                  const __grid_constant__ StepArguments<T> a) {
  constexpr int N = kGroup<P>;
  using Memory = StepMemory<T, P>;
  LYAPCUDA_SHARED(Memory, memory);
  const auto wide = [&](int segment, int left) {
    bool all = left == N && aligned16(a.q + table.offset[segment]);
    LYAPCUDA_UNROLL
    for (int list = 0; list < 4; ++list) all = all && aligned16(table.data[list][segment]);
    return all;
  };
  // A copy: block 0 writes the state once every block has read it.
  if (threadIdx.x < kStateSize) memory.state[threadIdx.x] = a.state[threadIdx.x];
  {
    const AscentArguments<T> arguments{nullptr,        nullptr,        nullptr, nullptr, a.state,
                                       a.options.sign, a.weight_decay, 0.0,     nullptr};
    Ascent<T, P, kRealised, false> op(arguments);
    for_each_held<T, P>(table, [&](int segment, int64_t i, int left, int held) {
      const bool whole = wide(segment, left);
      T q[N], g0[N], g1[N], theta[N], d[N], w;
      load_some(q, a.q + table.offset[segment] + i, left, whole);
      load_some(g0, table.data[1][segment] + i, left, whole);
      load_some(g1, table.data[2][segment] + i, left, whole);
      if constexpr (kRealised) load_some(theta, table.data[3][segment] + i, left, whole);
      LYAPCUDA_UNROLL
      for (int k = 0; k < N; ++k) {
        d[k] = T(0);
        if (k < left) op.element(q[k], g0[k], g1[k], kRealised ? theta[k] : T(0), T(0), d[k], w);
      }
      put(memory.d + held, d);
    });
    write_sums(op, a.rows);
  }
  LYAPCUDA_GRID_SYNC();
  // Every block finds the same numbers for itself.
  double sums[kSumSize];
  add_sums<T>(sums, a.rows, gridDim.x);
  if (threadIdx.x == 0) exponent_step(memory.state, sums, a.losses, a.loss_count, a.options);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x < kStateSize) a.state[threadIdx.x] = memory.state[threadIdx.x];
  const T scale = static_cast<T>(memory.state[k_scale]);
  const bool committed = memory.state[k_committed] != 0.0;
  for_each_held<T, P>(table, [&](int segment, int64_t i, int left, int held) {
    const bool whole = wide(segment, left);
    T* const at = a.q + table.offset[segment] + i;
    T q[N], theta[N];
    load_some(theta, table.data[3][segment] + i, left, whole);
    if (committed) {
      get(q, memory.d + held);
      store_some(at, q, left, whole);
    } else {
      load_some(q, at, left, whole);
    }
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) theta[k] += product(q[k], scale);
    store_some(table.data[0][segment] + i, theta, left, whole);
  });
}

}  // namespace lyapcuda::kernels
