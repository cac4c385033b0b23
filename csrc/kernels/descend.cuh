// θ ← θ − lr·(g + weight_decay·θ), with lr = min(gain/h, max_lr) worked out from the state.
#pragma once

#include "../exponent.h"
#include "segments.cuh"

namespace lyapcuda::kernels {

struct DescendArguments {
  const double* state;
  double gain, max_lr, weight_decay;
  double* used;  // the learning rate taken
};

template <class P>
using DescendSegments = Segments<P, 2>;  // θ, its gradient

template <class T, class P>
struct Descend {
  T rate, weight_decay;

  __device__ __forceinline__ bool aligned(const DescendSegments<P>& table, int segment) const {
    return aligned16(table.data[0][segment]) && aligned16(table.data[1][segment]);
  }

  template <int N>
  __device__ __forceinline__ void group(const DescendSegments<P>& table, int segment, int64_t i) {
    T theta[N], gradient[N];
    load(theta, table.data[0][segment] + i);
    load(gradient, table.data[1][segment] + i);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) {
      theta[k] -= product(gradient[k] + product(theta[k], weight_decay), rate);
    }
    store(table.data[0][segment] + i, theta);
  }
};

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 5)
    descend(const __grid_constant__ DescendSegments<P> table,
            const __grid_constant__ DescendArguments a) {
  // A step that was not finite, or nothing measured yet: stay where we are.
  const double h = a.state[k_h_ema];
  const bool go = a.state[k_accepted] != 0.0 && all_finite(&h, 1);
  const double lr = go ? learning_rate(h, a.gain, a.max_lr) : 0.0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.used = lr;
  if (!go) return;
  Descend<T, P> op{static_cast<T>(lr), static_cast<T>(a.weight_decay)};
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
