// θ1 = θ + scale·q; where the last step was not committed, q is first taken back from q_previous,
// and the momentum p, if there is one, from p_previous.
#pragma once

#include "../state.h"
#include "segments.cuh"

namespace lyapcuda::kernels {

template <class T>
struct RecenterArguments {
  T* q;
  const T* q_previous;  // θ1 may share its memory: each element is read before it is written
  T* p;                 // null without momentum
  const T* p_previous;
  const double* state;
};

template <class P>
using RecenterSegments = Segments<P, 2>;  // θ1, θ

template <class T, class P>
struct Recenter {
  const RecenterArguments<T>& a;
  T scale;
  bool committed;

  __device__ explicit Recenter(const RecenterArguments<T>& arguments)
      : a(arguments),
        scale(static_cast<T>(a.state[k_scale])),
        committed(a.state[k_committed] != 0.0) {}

  __device__ __forceinline__ bool aligned(const RecenterSegments<P>& table, int segment) const {
    const int64_t at = table.offset[segment];
    return aligned16(a.q + at) && aligned16(a.q_previous + at) &&
           aligned16(table.data[0][segment]) && aligned16(table.data[1][segment]) &&
           (a.p == nullptr || (aligned16(a.p + at) && aligned16(a.p_previous + at)));
  }

  template <int N>
  __device__ __forceinline__ void group(const RecenterSegments<P>& table, int segment, int64_t i) {
    const int64_t at = table.offset[segment] + i;
    T q[N], theta[N];
    load(q, (committed ? a.q : a.q_previous) + at);
    load(theta, table.data[1][segment] + i);
    if (!committed) store(a.q + at, q);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) theta[k] += product(q[k], scale);
    store(table.data[0][segment] + i, theta);
    if (!committed && a.p != nullptr) {
      load(q, a.p_previous + at);
      store(a.p + at, q);
    }
  }
};

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 5)
    recenter(const __grid_constant__ RecenterSegments<P> table,
             const __grid_constant__ RecenterArguments<T> arguments) {
  Recenter<T, P> op(arguments);
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
