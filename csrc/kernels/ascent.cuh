// d = scale·q + rate·w, w = momentum·scale·p + y, y = g1 − g0 + weight_decay·(displacement), and
// the sums of it, in one pass; the arithmetic is that of cpu/ascent.inc, to the bit.
#pragma once

#include <cfloat>
#include <cmath>

#include "../state.h"
#include "segments.cuh"

namespace lyapcuda::kernels {

template <class T>
struct AscentArguments {
  T* d;  // flat buffers; d may be q
  const T *q, *p;
  T* p_next;
  const double* state;
  double sign, weight_decay, momentum;
  double* rows;  // [blocks, kSumSize]: what ascent_finish sums
};

template <class P>
using AscentSegments = Segments<const P, 3>;  // g0, g1, θ (θ only where realised)

template <class T, class P, bool kRealised, bool kMomentum>
struct Ascent {
  static constexpr int kSums = kRealised ? kSumSize : kSumCarriedQ;

  const AscentArguments<T>& a;
  T scale, rate, weight_decay, momentum;
  double sums[kSums] = {};

  __device__ explicit Ascent(const AscentArguments<T>& arguments)
      : a(arguments),
        scale(static_cast<T>(a.state[k_scale])),
        rate(static_cast<T>(a.sign * a.state[k_beta])),
        weight_decay(static_cast<T>(a.weight_decay)),
        momentum(static_cast<T>(a.momentum)) {}

  // Takes q, p and θ of one element to d and w.
  __device__ __forceinline__ void element(T q, T g0, T g1, T theta, T p, T& d, T& w) {
    const T carried = product(q, scale);
    T moved = carried;
    if constexpr (kRealised) moved = round_to<P>(theta + carried) - theta;  // what recenter wrote
    const T y = (g1 - g0) + product(moved, weight_decay);
    w = y;
    if constexpr (kMomentum) w = product(product(p, scale), momentum) + y;
    d = carried + product(w, rate);
    accumulate(sums[kSumDD], d, d);
    accumulate(sums[kSumQQ], moved, moved);
    accumulate(sums[kSumQY], moved, y);
    accumulate(sums[kSumYY], y, y);
    if constexpr (kRealised) {
      accumulate(sums[kSumCarriedQ], carried, moved);
      accumulate(sums[kSumCarriedY], carried, y);
    }
  }

  __device__ __forceinline__ bool aligned(const AscentSegments<P>& table, int segment) const {
    const int64_t at = table.offset[segment];
    return aligned16(a.d + at) && aligned16(a.q + at) && aligned16(table.data[0][segment]) &&
           aligned16(table.data[1][segment]) && (!kRealised || aligned16(table.data[2][segment])) &&
           (!kMomentum || (aligned16(a.p + at) && aligned16(a.p_next + at)));
  }

  template <int N>
  __device__ __forceinline__ void group(const AscentSegments<P>& table, int segment, int64_t i) {
    const int64_t at = table.offset[segment] + i;
    T q[N], g0[N], g1[N], theta[N], p[N], d[N], w[N];
    load(q, a.q + at);
    load(g0, table.data[0][segment] + i);
    load(g1, table.data[1][segment] + i);
    if constexpr (kRealised) load(theta, table.data[2][segment] + i);
    if constexpr (kMomentum) load(p, a.p + at);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) {
      element(q[k], g0[k], g1[k], kRealised ? theta[k] : T(0), kMomentum ? p[k] : T(0), d[k], w[k]);
    }
    store(a.d + at, d);
    if constexpr (kMomentum) store(a.p_next + at, w);
  }
};

// Blocks that a multiprocessor is to hold, at 64 registers a thread; with all five streams around
// 16-bit storage that would spill, and a thread has seven loads in flight, so three do.
template <class P, bool kRealised, bool kMomentum>
constexpr int kAscentBlocks = kRealised && kMomentum && sizeof(P) == 2 ? 3 : 4;

// A block's row of sums, from those of its threads; once a kernel.
template <class Op>
__device__ __forceinline__ void write_sums(Op& op, double* rows) {
  constexpr bool kRealised = Op::kSums == kSumSize;
  block_sum(op.sums);
  if (threadIdx.x != 0) return;
  double* const row = rows + int64_t{blockIdx.x} * kSumSize;
  LYAPCUDA_UNROLL
  for (int k = 0; k < kSumCarriedQ; ++k) row[k] = op.sums[k];
  row[kSumCarriedQ] = op.sums[kRealised ? int{kSumCarriedQ} : int{kSumQQ}];
  row[kSumCarriedY] = op.sums[kRealised ? int{kSumCarriedY} : int{kSumQY}];
}

// The sums of all rows, in thread 0.
template <class T>
__device__ __forceinline__ void add_sums(double (&sums)[kSumSize], const double* rows,
                                         int64_t count) {
  sum_rows(sums, rows, count);
  // An element of d may not fit T: it is not to be taken for a separation.
  constexpr double largest = sizeof(T) == sizeof(float) ? double{FLT_MAX} : DBL_MAX;
  if (!(sqrt(sums[kSumDD]) < largest)) sums[kSumDD] = INFINITY;
}

template <class T, class P, bool kRealised, bool kMomentum>
__global__ void __launch_bounds__(kThreads, (kAscentBlocks<P, kRealised, kMomentum>))
    ascent(const __grid_constant__ AscentSegments<P> table,
           const __grid_constant__ AscentArguments<T> arguments) {
  Ascent<T, P, kRealised, kMomentum> op(arguments);
  for_each_group(table, op);
  write_sums(op, arguments.rows);
}

// The rows of every launch of ascent, in one block, to the sums of the pass.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    ascent_finish(const double* rows, int64_t count, double* out) {
  double sums[kSumSize];
  add_sums<T>(sums, rows, count);
  if (threadIdx.x != 0) return;
  LYAPCUDA_UNROLL
  for (int k = 0; k < kSumSize; ++k) out[k] = sums[k];
}

}  // namespace lyapcuda::kernels
