// Another separation where the state says that one was lost; else nothing but the launch.
//
//   reseed<T>   any grid of kThreads, a launch per table of for_each_table (list: not read)
#pragma once

#include "../reseed.h"
#include "segments.cuh"

namespace lyapcuda::kernels {

template <class T>
struct ReseedArguments {
  T *panel, *p;  // (k, n) each; p may be null
  int64_t n, k;  // k = 0: one flat buffer
  const double* state;
  int64_t elements, seed;
};

template <class T>
using ReseedSegments = Segments<const T, 1>;

template <class T>
struct ReseedElements {
  const ReseedArguments<T>& a;
  Reseed lost;

  __device__ __forceinline__ bool aligned(const ReseedSegments<T>&, int) const { return false; }

  template <int N>
  __device__ __forceinline__ void group(const ReseedSegments<T>& table, int segment, int64_t i) {
    const int64_t place = table.offset[segment] + i, at = lost.row * a.n + place;
    LYAPCUDA_UNROLL
    for (int e = 0; e < N; ++e) {
      a.panel[at + e] = static_cast<T>(lost.element(place + e) * lost.size);
      if (a.p != nullptr) a.p[at + e] = T{0};
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    reseed(const __grid_constant__ ReseedSegments<T> table,
           const __grid_constant__ ReseedArguments<T> arguments) {
  const Reseed lost = reseed_of(arguments.state, arguments.k, arguments.elements, arguments.seed);
  if (lost.row < 0) return;
  ReseedElements<T> op{arguments, lost};
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
