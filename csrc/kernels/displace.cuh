// copies = θ + step·v, rounded to storage, and what of it the rounding left along v; the arithmetic
// of elements is that of cpu/displace.inc, to the bit.
//
//   displace<T, P>            any grid of kThreads, a launch per table of for_each_table
//                             (lists: copies, θ); rows: [blocks of all launches, kDisplaceSums]
//   displace_finish           1 block of kThreads: the rows to the two sums
#pragma once

#include "segments.cuh"

namespace lyapcuda::kernels {

constexpr int kDisplaceSums = 2;  // Σ v·(copies − θ), Σ v²

template <class T>
struct DisplaceArguments {
  const T* v;  // flat
  const double* step;
  double* rows;
};

template <class P>
using DisplaceSegments = Segments<P, 2>;  // copies, θ

template <class T, class P>
struct Displace {
  const DisplaceArguments<T>& a;
  T step;
  double sums[kDisplaceSums] = {};

  __device__ explicit Displace(const DisplaceArguments<T>& arguments)
      : a(arguments), step(static_cast<T>(*arguments.step)) {}

  __device__ __forceinline__ bool aligned(const DisplaceSegments<P>& table, int segment) const {
    return aligned16(a.v + table.offset[segment]) && aligned16(table.data[0][segment]) &&
           aligned16(table.data[1][segment]);
  }

  template <int N>
  __device__ __forceinline__ void group(const DisplaceSegments<P>& table, int segment, int64_t i) {
    T v[N], theta[N], copy[N];
    load(v, a.v + table.offset[segment] + i);
    load(theta, table.data[1][segment] + i);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) {
      copy[k] = round_to<P>(theta[k] + product(v[k], step));
      accumulate(sums[0], v[k], copy[k] - theta[k]);
      accumulate(sums[1], v[k], v[k]);
    }
    store(table.data[0][segment] + i, copy);
  }
};

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 5)
    displace(const __grid_constant__ DisplaceSegments<P> table,
             const __grid_constant__ DisplaceArguments<T> arguments) {
  Displace<T, P> op(arguments);
  for_each_group(table, op);
  block_sum(op.sums);
  if (threadIdx.x != 0) return;
  LYAPCUDA_UNROLL
  for (int k = 0; k < kDisplaceSums; ++k) {
    arguments.rows[int64_t{blockIdx.x} * kDisplaceSums + k] = op.sums[k];
  }
}

__global__ void __launch_bounds__(kThreads, 5)
    displace_finish(const double* rows, int64_t count, double* out) {
  double sums[kDisplaceSums];
  sum_rows(sums, rows, count);
  if (threadIdx.x != 0) return;
  LYAPCUDA_UNROLL
  for (int k = 0; k < kDisplaceSums; ++k) out[k] = sums[k];
}

}  // namespace lyapcuda::kernels
