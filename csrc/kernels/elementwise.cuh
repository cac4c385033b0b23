// The elementwise driver: how an op's streams are read and written, and the kernel around it.
//
//   elementwise<Op>              any grid of kThreads, a launch per table of for_each_table;
//                                rows: [blocks of all launches, Op::Arguments::kSums]
//   elementwise_finish<Arguments>   1 block of kThreads: the rows to the op's output
#pragma once

#include "../ops/lists.h"
#include "pack.cuh"
#include "segments.cuh"

namespace lyapcuda::kernels {

// N elements from element i of a segment on, which is element `at` of the flat buffers.
template <class T, class P, int kLists, int N>
struct Group {
  using Value = Pack<T, N>;
  using Sum = Accumulator;

  const Segments<P, kLists>& table;
  int segment;
  int64_t at, i;

  LYAPCUDA_INLINE int64_t place() const { return at; }
  LYAPCUDA_INLINE int64_t count() const { return N; }
  template <class X>
  LYAPCUDA_INLINE Value read(const X* flat) const {
    Value v;
    load(v.of, flat + at);
    return v;
  }
  template <int list>
  LYAPCUDA_INLINE Value read(Listed<list>) const {
    Value v;
    load(v.of, static_cast<const P*>(table.data[list][segment] + i));
    return v;
  }
  template <class X>
  LYAPCUDA_INLINE void write(X* flat, const Value& v) const {
    store(flat + at, v.of);
  }
  template <int list>
  LYAPCUDA_INLINE void write(Listed<list>, const Value& v) const {
    store(table.data[list][segment] + i, v.of);
  }
  template <class X>
  LYAPCUDA_INLINE void write_output(X* flat, const Value& v) const {
    write(flat, v);
  }
};

// Whether a stream can be accessed by 16 bytes in a segment; none (null) can.
template <class P, int kLists>
struct IsAligned {
  const Segments<P, kLists>& table;
  int segment;

  template <class X>
  LYAPCUDA_INLINE bool operator()(const X* flat) const {
    return flat == nullptr || aligned16(flat + table.offset[segment]);
  }
  template <int list>
  LYAPCUDA_INLINE bool operator()(Listed<list>) const {
    return aligned16(table.data[list][segment]);
  }
};

// Takes an op to every element of every segment once, kGroup<P> at a time where 16-byte accesses
// may be had, one at a time elsewhere. A chunk starts at a multiple of the group, so what holds for
// a segment holds for its chunks.
template <class Op, class P, int kLists>
__device__ __forceinline__ void for_each_group(const Segments<P, kLists>& table, const Op& op,
                                               Accumulator* sums) {
  using T = typename Op::T;
  constexpr int kStep = kGroup<P>;
  const int64_t chunks = table.first_chunk[table.count];
  int segment = 0;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    segment = segment_of(table, chunk, segment);
    const int64_t begin = (chunk - table.first_chunk[segment]) * kChunk<P>;
    const int64_t left = table.size[segment] - begin, at = table.offset[segment] + begin;
    const int length = left < kChunk<P> ? static_cast<int>(left) : kChunk<P>;
    const bool aligned = op.aligned(IsAligned<P, kLists>{table, segment});
    const int whole = aligned ? length / kStep * kStep : 0;
    // Rolled: one group has enough loads in flight, two would not fit the registers.
    LYAPCUDA_ROLLED
    for (int i = threadIdx.x * kStep; i < whole; i += kThreads * kStep) {
      op(Group<T, P, kLists, kStep>{table, segment, at + i, begin + i}, sums);
    }
    LYAPCUDA_ROLLED
    for (int i = whole + static_cast<int>(threadIdx.x); i < length; i += kThreads) {
      op(Group<T, P, kLists, 1>{table, segment, at + i, begin + i}, sums);
    }
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::Arguments::kBlocks)
    elementwise(const __grid_constant__ Segments<typename Op::P, Op::kLists> table,
                const __grid_constant__ typename Op::Arguments arguments, double* rows) {
  constexpr int kSums = Op::Arguments::kSums;
  if (blockIdx.x == 0 && threadIdx.x == 0) arguments.note();
  if (!arguments.go()) return;
  const Op op(arguments);
  Accumulator sums[kSums > 0 ? kSums : 1] = {};
  for_each_group(table, op, sums);
  if constexpr (kSums > 0) {
    double totals[kSums];
    LYAPCUDA_UNROLL
    for (int k = 0; k < kSums; ++k) totals[k] = total(sums[k]);
    block_sum(totals);
    if (threadIdx.x != 0) return;
    LYAPCUDA_UNROLL
    for (int k = 0; k < kSums; ++k) rows[int64_t{blockIdx.x} * kSums + k] = totals[k];
  }
}

template <class Arguments>
__global__ void __launch_bounds__(kThreads, 4)
    elementwise_finish(const double* rows, int64_t count,
                       const __grid_constant__ Arguments arguments, double* out) {
  double sums[Arguments::kSums];
  sum_rows(sums, rows, count);
  if (threadIdx.x == 0) arguments.finish(sums, out);
}

}  // namespace lyapcuda::kernels
