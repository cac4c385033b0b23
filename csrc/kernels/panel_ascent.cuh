// The step of k copies, seen from their separations: y_j = g1_j − g0 + weight_decay·(displacement),
// d_j = q_j + rate·w, w = momentum·p_j + y_j; fused with the Gram matrix of all these rows. The
// arithmetic of elements is that of cpu/panel_ascent.inc, to the bit.
//
//   panel_ascent<T, P, kRealised, kMomentum, kRows>
//                       rows = (2 + kRealised + kMomentum)·k; kRows: 32, 64 or 128, the next above
//                       grid: any, of panel_threads(kRows); a launch per table of for_each_table
//                       with chunks of kPanelLength<T, kRows> (lists: g0, θ)
//                       partial: gram_row(symmetric_pairs(rows)) doubles a block, of all launches
//   gram_finish         (gram_finish.cuh) with shape {rows, rows, true}
//   panel_ascent_check<T>  1 block of 32: a Gram matrix whose d may not fit T is made unusable
//
// Meant to be bound by memory. At k = 14 an element is 172 bytes in all rows, 11 clocks of the 15
// bytes that a multiprocessor of an H200 gets; the products of its 28 rows are 5 clocks of the
// tensor cores at their full rate, widening them 2 of the conversions. Up to 32 rows of the stack a
// block's next tile is on its way while it multiplies the one at hand; above, other blocks' are.
#pragma once

#include <cfloat>

#include "../stacked_gram.h"
#include "panel_gram.cuh"

namespace lyapcuda::kernels {

template <class T, class P>
struct PanelAscentArguments {
  T* d;  // panels; d may be q, or g1
  const T* q;
  const P* g1;
  const T* p;
  T* p_next;
  int64_t n;  // elements of a row
  int k;
  const double* beta;  // in the panel's state
  double sign;
  T weight_decay, momentum;  // rounded by the host: constants, which need no register
  double* partial;
};

template <class P>
using PanelAscentSegments = Segments<const P, 2>;  // g0, θ (θ only where realised)

__host__ __device__ constexpr int panel_threads(int rows) { return rows <= 64 ? 256 : 512; }
template <class T, int kRows>
constexpr int kPanelLength = Tile<T, kRows>::kLength;

// Where a tile lies.
template <class P>
struct PanelPlace {
  const P *g0, *theta;
  int64_t begin;  // in a row of the panels
  int length;
  bool wide;  // a full tile, aligned to 16 bytes
};

template <class T, class P, bool kRealised, bool kMomentum, int kRows>
struct PanelAscent {
  static constexpr int kBlock = panel_threads(kRows), kLength = kPanelLength<T, kRows>;
  static constexpr int N = kGroup<T>,
                       kGroups = kLength / N;       // elements of a thread; groups of a row
  static constexpr int kAtOnce = kBlock / kGroups;  // rows that the block's threads cover
  // Rows that a thread loads before it stores: two where the sums leave registers for them, or
  // where that is the whole tile.
  static constexpr int kMost = kRows / (2 + kRealised + kMomentum);  // separations
  static constexpr int kFlight =
      kMost <= kAtOnce || (kRows > 32 && (kRealised || kMomentum)) ? 1 : 2;
  static constexpr bool kAhead = kMost <= kAtOnce * kFlight && kRows == 32;

  const PanelAscentArguments<T, P>& a;
  const PanelAscentSegments<P>& table;
  bool aligned;
  int segment = 0;
  PanelPlace<P> place;
  T q[kFlight][N], g1[kFlight][N], p[kFlight][N], base[N], here[N];

  __device__ PanelAscent(const PanelAscentSegments<P>& segments,
                         const PanelAscentArguments<T, P>& arguments)
      : a(arguments), table(segments) {
    aligned = rows_aligned16(a.d, a.n, a.k) && rows_aligned16(a.q, a.n, a.k) &&
              rows_aligned16(a.g1, a.n, a.k) &&
              (!kMomentum || (rows_aligned16(a.p, a.n, a.k) && rows_aligned16(a.p_next, a.n, a.k)));
  }

  __device__ __forceinline__ void find(int64_t tile) {
    segment = segment_of(table, tile, segment);
    const int64_t inside = (tile - table.first_chunk[segment]) * kLength;
    const int64_t left = table.size[segment] - inside;
    place.g0 = table.data[0][segment] + inside;
    place.theta = kRealised ? table.data[1][segment] + inside : nullptr;
    place.begin = table.offset[segment] + inside;
    place.length = left < kLength ? static_cast<int>(left) : kLength;
    place.wide = aligned && left >= kLength && table.offset[segment] % kGroup<P> == 0 &&
                 aligned16(place.g0) && aligned16(place.theta);
  }

  // This thread's elements of a tile start at e; its first row is first().
  __device__ __forceinline__ int e() const { return static_cast<int>(threadIdx.x) % kGroups * N; }
  __device__ __forceinline__ int first() const { return static_cast<int>(threadIdx.x) / kGroups; }

  __device__ __forceinline__ void load_base() {
    load_some(base, place.g0 + e(), place.length - e(), place.wide);
    if constexpr (kRealised) {
      load_some(here, place.theta + e(), place.length - e(), place.wide);
    }
  }

  __device__ __forceinline__ void load_rows(int j) {
    LYAPCUDA_UNROLL
    for (int f = 0; f < kFlight; ++f) {
      const int row = j + f * kAtOnce, left = place.length - e();
      if (row >= a.k) continue;
      const int64_t at = row * a.n + place.begin + e();
      load_some(q[f], a.q + at, left, place.wide);
      load_some(g1[f], a.g1 + at, left, place.wide);
      if constexpr (kMomentum) load_some(p[f], a.p + at, left, place.wide);
    }
  }

  // Steps what was loaded, and leaves it in the stack of rows in shared memory. What lies behind a
  // tile's length was loaded as zeros, which stay zeros.
  __device__ __forceinline__ void step_rows(int j, Tile<T, kRows>& tile) {
    const T rate = static_cast<T>(a.sign * *a.beta);
    LYAPCUDA_UNROLL
    for (int f = 0; f < kFlight; ++f) {
      const int row = j + f * kAtOnce, left = place.length - e();
      if (row >= a.k) continue;
      T moved[N], y[N], w[N], d[N];
      LYAPCUDA_UNROLL
      for (int i = 0; i < N; ++i) {
        const T carried = q[f][i];
        moved[i] = carried;
        // What panel_recenter wrote, less θ.
        if constexpr (kRealised) moved[i] = round_to<P>(here[i] + carried) - here[i];
        y[i] = (g1[f][i] - base[i]) + product(moved[i], a.weight_decay);
        w[i] = y[i];
        if constexpr (kMomentum) w[i] = product(p[f][i], a.momentum) + y[i];
        d[i] = carried + product(w[i], rate);
        // (A rate that is not finite would make a NaN of them.)
        if (kMomentum && i >= left) d[i] = T(0);
      }
      const int64_t at = row * a.n + place.begin + e();
      store_some(a.d + at, d, left, place.wide);
      if constexpr (kMomentum) store_some(a.p_next + at, w, left, place.wide);
      put(tile.row(row) + e(), q[f]);
      put(tile.row(a.k + row) + e(), y);
      if constexpr (kRealised) put(tile.row(2 * a.k + row) + e(), moved);
      if constexpr (kMomentum) put(tile.row((2 + kRealised) * a.k + row) + e(), d);
    }
  }
};

template <class T, class P, bool kRealised, bool kMomentum, int kRows>
__global__ void __launch_bounds__(panel_threads(kRows), kRows <= 64 ? 2 : 1)
    panel_ascent(const __grid_constant__ PanelAscentSegments<P> table,
                 const __grid_constant__ PanelAscentArguments<T, P> arguments) {
  using Step = PanelAscent<T, P, kRealised, kMomentum, kRows>;
  constexpr int kWarpCount = Step::kBlock / 32;
  using Sums = GramSums<T, kRows, kWarpCount>;
  LYAPCUDA_SHARED(typename Sums::Memory, memory);
  Step step(table, arguments);
  const int k = arguments.k, rows = (2 + kRealised + kMomentum) * k;
  const int supers = kRows == kSuper ? 1 : supers_of(rows);
  Sums sums(symmetric_share<kWarpCount>(threadIdx.x / 32, supers));
  const int64_t tiles = table.first_chunk[table.count];
  int64_t tile = blockIdx.x;
  const auto start = [&](int64_t of) {
    step.find(of);
    step.load_base();
    step.load_rows(step.first());
  };
  if (Step::kAhead && tile < tiles) start(tile);
  for (; tile < tiles; tile += gridDim.x) {
    if constexpr (Step::kAhead) {
      step.step_rows(step.first(), memory.tile);
    } else {
      step.find(tile);
      step.load_base();
      LYAPCUDA_ROLLED
      for (int j = step.first(); j < k; j += Step::kAtOnce * Step::kFlight) {
        step.load_rows(j);
        step.step_rows(j, memory.tile);
      }
    }
    __syncthreads();
    if (Step::kAhead && tile + gridDim.x < tiles) start(tile + gridDim.x);
    sums.add(memory.tile, rows);
    __syncthreads();
  }
  sums.finish(memory, arguments.partial, symmetric_pairs(rows),
              symmetric_slices<kWarpCount>(supers));
}

template <class T>
__global__ void __launch_bounds__(32)
    panel_ascent_check(double* gram, int k, bool realised, bool heavy, const double* beta,
                       double sign) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  constexpr double largest = sizeof(T) == sizeof(float) ? double{FLT_MAX} : DBL_MAX;
  refuse_overflow(gram, k, realised, heavy, sign * *beta, largest);
}

}  // namespace lyapcuda::kernels
