// out = scale·(plus − minus) + weight_decay·v + keep·out, left to right, terms of zero left out;
// the arithmetic is that of cpu/difference.inc, to the bit.
//
//   difference<T, P>          any grid of kThreads, a launch per table of for_each_table
//                             (lists: plus, minus)
#pragma once

#include "segments.cuh"

namespace lyapcuda::kernels {

template <class T>
struct DifferenceArguments {
  T* out;      // flat; may share memory with plus or minus, element by element
  const T* v;  // flat; read where weight_decay is not 0
  const double* scale;
  double keep, weight_decay;
};

template <class P>
using DifferenceSegments = Segments<const P, 2>;  // plus, minus

template <class T, class P>
struct Difference {
  const DifferenceArguments<T>& a;
  T scale, keep, weight_decay;
  bool keeps, decays;

  __device__ explicit Difference(const DifferenceArguments<T>& arguments)
      : a(arguments),
        scale(static_cast<T>(*arguments.scale)),
        keep(static_cast<T>(arguments.keep)),
        weight_decay(static_cast<T>(arguments.weight_decay)),
        keeps(arguments.keep != 0.0),
        decays(arguments.weight_decay != 0.0) {}

  __device__ __forceinline__ bool aligned(const DifferenceSegments<P>& table, int segment) const {
    const int64_t at = table.offset[segment];
    return aligned16(a.out + at) && aligned16(table.data[0][segment]) &&
           aligned16(table.data[1][segment]) && (!decays || aligned16(a.v + at));
  }

  template <int N>
  __device__ __forceinline__ void group(const DifferenceSegments<P>& table, int segment,
                                        int64_t i) {
    const int64_t at = table.offset[segment] + i;
    T plus[N], minus[N], v[N], held[N];
    load(plus, table.data[0][segment] + i);
    load(minus, table.data[1][segment] + i);
    if (decays) load(v, a.v + at);
    if (keeps) load(held, a.out + at);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) plus[k] = product(scale, plus[k] - minus[k]);
    if (decays) {
      LYAPCUDA_UNROLL
      for (int k = 0; k < N; ++k) plus[k] += product(weight_decay, v[k]);
    }
    if (keeps) {
      LYAPCUDA_UNROLL
      for (int k = 0; k < N; ++k) plus[k] += product(keep, held[k]);
    }
    store(a.out + at, plus);
  }
};

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 4)
    difference(const __grid_constant__ DifferenceSegments<P> table,
               const __grid_constant__ DifferenceArguments<T> arguments) {
  Difference<T, P> op(arguments);
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
