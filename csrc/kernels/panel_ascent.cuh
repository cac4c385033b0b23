// The step of k copies, seen from their separations (elements/ascent.h), fused with the Gram matrix
// of the rows q, y, moved and d.
//
//   panel_ascent<T, P, kRealised, kMomentum, kMetric, kRows>
//                       grid: any, of panel_threads(kRows); a launch per table of for_each_table
//                       with chunks of kPanelLength<T, kRows> (lists: g0, θ)
//                       partial: gram_row(symmetric_pairs(rows)) doubles a block, of all launches
//   gram_finish         (gram_finish.cuh) with shape {rows, rows, true}
//   panel_ascent_check<T>  1 block of 32: a Gram matrix whose d may not fit T is made unusable
//
// rows = (2 + kRealised + kMomentum)·k; kRows: the first of 16, 32, 64, 128 that they fit in.
//
// Meant to be bound by memory. At k = 14 an element is 172 bytes in all rows, 11 clocks of the 15
// bytes that a multiprocessor of an H200 gets; the products of its 28 rows are 5 clocks of the
// tensor cores at their full rate, widening them 2 of the conversions. Up to 32 rows of the stack a
// block's next tile is on its way while it works on the one at hand; above, other blocks' are.
#pragma once

#include "../scalars/stacked_gram.h"
#include "pack.cuh"
#include "panel_gram.cuh"

namespace lyapcuda::kernels {

template <class T, class P>
struct PanelAscentArguments {
  T* d;  // panels; d may be q, or lie where g1 does
  const T* q;
  const P* g1;
  const T* p;
  T* p_next;
  const T* metric;  // shared by all rows
  int64_t n;        // elements of a row
  int k;
  const double *beta, *displacement;  // in the panel's state
  double sign;
  T weight_decay, momentum;  // rounded by the host: constants, which need no register
  double* partial;
};

template <class P>
using PanelAscentSegments = Segments<P, 2>;  // g0, θ (θ only where realised)

__host__ __device__ constexpr int panel_threads(int rows) { return rows <= 64 ? 256 : 512; }
// Blocks that a multiprocessor is to hold, as registers allow.
template <class T, bool kRealised, bool kMomentum, bool kMetric, int kRows>
constexpr int kPanelBlocks = [] {
  const bool plain = !kRealised && !kMomentum && !kMetric && sizeof(T) == sizeof(float);
  if (kRows <= 16) return plain ? 4 : 3;
  if (kRows <= 32) return plain ? 3 : 2;
  return kRows <= 64 ? 2 : 1;
}();
template <class T, int kRows>
constexpr int kPanelLength = Tile<T, kRows>::kLength;

template <class T, class P, bool kRealised, bool kMomentum, bool kMetric, int kRows>
struct PanelAscent {
  static constexpr int kBlock = panel_threads(kRows), kLength = kPanelLength<T, kRows>;
  static constexpr int N = kGroup<T>;               // elements of a thread
  static constexpr int kGroups = kLength / N;       // of a row
  static constexpr int kAtOnce = kBlock / kGroups;  // rows that the block's threads cover

  using Sums = GramSums<T, kRows, kBlock / 32>;
  struct Memory {
    typename Sums::Memory stack;
    alignas(16) P g0[kSlots<kRows>][kLength];
    alignas(16) P theta[kSlots<kRows>][kRealised ? kLength : kGroup<P>];
    alignas(16) T metric[kSlots<kRows>][kMetric ? kLength : kGroup<T>];
  };

  Memory& memory;
  const PanelAscentArguments<T, P>& a;
  const PanelAscentSegments<P>& table;
  bool aligned;
  int segment = 0;

  __device__ PanelAscent(Memory& shared, const PanelAscentSegments<P>& segments,
                         const PanelAscentArguments<T, P>& arguments)
      : memory(shared), a(arguments), table(segments) {
    aligned =
        rows_aligned16(a.d, a.n, a.k) && rows_aligned16(a.q, a.n, a.k) &&
        rows_aligned16(a.g1, a.n, a.k) &&
        (!kMomentum || (rows_aligned16(a.p, a.n, a.k) && rows_aligned16(a.p_next, a.n, a.k))) &&
        (!kMetric || aligned16(a.metric));
  }

  // This thread's elements of a tile start at e; its first row is first().
  __device__ __forceinline__ int e() const { return static_cast<int>(threadIdx.x % kGroups) * N; }
  __device__ __forceinline__ int first() const { return static_cast<int>(threadIdx.x / kGroups); }

  // Starts the copies: of q, g1 and p to where q, y and d are to be in the stack of rows.
  __device__ __forceinline__ SegmentPlace fill(int64_t tile, int slot) {
    segment = segment_of(table, tile, segment);
    const SegmentPlace place = place_in<kLength>(table, segment, tile, aligned);
    const int left = place.length - e();
    const int64_t inside = place.inside + e();
    Tile<T, kRows>& stack = memory.stack.tiles[slot];
    if (first() == 0) {
      start_copy<N>(memory.g0[slot] + e(), table.data[0][segment] + inside, left, place.aligned);
      if constexpr (kRealised) {
        start_copy<N>(memory.theta[slot] + e(), table.data[1][segment] + inside, left,
                      place.aligned);
      }
      if constexpr (kMetric) {
        start_copy<N>(memory.metric[slot] + e(), a.metric + place.begin + e(), left, place.aligned);
      }
    }
    LYAPCUDA_ROLLED
    for (int row = first(); row < a.k; row += kAtOnce) {
      const int64_t at = row * a.n + place.begin + e();
      start_copy<N>(stack.row(row) + e(), a.q + at, left, place.aligned);
      start_copy<N>(stack.row(a.k + row) + e(), a.g1 + at, left, place.aligned);
      if constexpr (kMomentum) {
        start_copy<N>(stack.row(heavy() + row) + e(), a.p + at, left, place.aligned);
      }
    }
    return place;
  }

  // y, d and what else the stack is to have of a tile whose copies are there. What lies behind its
  // length came as zeros, which stay zeros.
  __device__ __forceinline__ void step(const SegmentPlace& place, int slot) {
    AscentFactors<T> factors{static_cast<T>(a.sign * *a.beta), a.weight_decay, a.momentum, {}, {}};
    const int left = place.length - e();
    Tile<T, kRows>& stack = memory.stack.tiles[slot];
    AscentStreams<Pack<T, N>> of{};
    load_part(of.g0.of, memory.g0[slot] + e());
    if constexpr (kRealised && !kMetric) load_part(of.theta.of, memory.theta[slot] + e());
    LYAPCUDA_ROLLED
    for (int row = first(); row < a.k; row += kAtOnce) {
      Pack<T, N> q;
      get(q.of, stack.row(row) + e());
      load_part(of.g1.of, reinterpret_cast<const P*>(stack.row(a.k + row) + e()));
      if constexpr (kMomentum) get(of.p.of, stack.row(heavy() + row) + e());
      if constexpr (kMetric) {  // for each row anew: not all of them fit the registers
        get(of.metric.of, memory.metric[slot] + e());
        if constexpr (kRealised) load_part(of.theta.of, memory.theta[slot] + e());
        factors.displacement = static_cast<T>(a.displacement[row]);
        factors.inverse = T(1) / factors.displacement;
      }
      AscentValues<Pack<T, N>> v = ascent_values<P, kRealised, kMomentum, kMetric>(q, of, factors);
      if constexpr (kMomentum) {  // a rate that is not finite would make a NaN of the zeros
        LYAPCUDA_UNROLL
        for (int i = 0; i < N; ++i) {
          if (i >= left) v.d.of[i] = T(0);
        }
      }
      const int64_t at = row * a.n + place.begin + e();
      store_some(a.d + at, v.d.of, left, place.aligned);
      if constexpr (kMomentum) store_some(a.p_next + at, v.w.of, left, place.aligned);
      put(stack.row(a.k + row) + e(), v.y.of);
      if constexpr (kRealised) put(stack.row(2 * a.k + row) + e(), v.moved.of);
      if constexpr (kMomentum) put(stack.row(heavy() + row) + e(), v.d.of);
    }
  }

 private:
  // The first row of d in the stack.
  __device__ __forceinline__ int heavy() const { return (2 + kRealised) * a.k; }
};

template <class T, class P, bool kRealised, bool kMomentum, bool kMetric, int kRows>
__global__ void __launch_bounds__(panel_threads(kRows),
                                  kPanelBlocks<T, kRealised, kMomentum, kMetric, kRows>)
    panel_ascent(const __grid_constant__ PanelAscentSegments<P> table,
                 const __grid_constant__ PanelAscentArguments<T, P> arguments) {
  using Step = PanelAscent<T, P, kRealised, kMomentum, kMetric, kRows>;
  constexpr int kWarpCount = Step::kBlock / 32;
  LYAPCUDA_SHARED(typename Step::Memory, memory);
  Step step(memory, table, arguments);
  const int rows = (2 + kRealised + kMomentum) * arguments.k;
  const int supers = kRows <= kSuper ? 1 : supers_of(rows);
  typename Step::Sums sums(symmetric_share<kWarpCount>(threadIdx.x / 32, supers));
  const auto fill = [&](int64_t tile, int slot) { return step.fill(tile, slot); };
  const auto work = [&](const SegmentPlace& place, int slot) {
    __syncthreads();
    step.step(place, slot);
    __syncthreads();
    sums.add(memory.stack.tiles[slot], rows);
  };
  for_each_tile<kSlots<kRows>>(table.first_chunk[table.count], fill, work);
  __syncthreads();
  sums.finish(memory.stack, arguments.partial, symmetric_pairs(rows),
              symmetric_slices<kWarpCount>(supers));
}

template <class T>
__global__ void __launch_bounds__(32)
    panel_ascent_check(double* gram, int k, bool realised, bool heavy, const double* beta,
                       double sign) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  refuse_overflow(gram, k, realised, heavy, sign * *beta, largest_of<T>());
}

}  // namespace lyapcuda::kernels
