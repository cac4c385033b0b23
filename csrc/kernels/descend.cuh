// θ ← θ − lr·u, with lr = gain·min(1/h, max_lr) worked out from the state.
#pragma once

#include "direction.cuh"

namespace lyapcuda::kernels {

template <class T>
struct DescendArguments {
  const double *state, *factor;  // factor may be null
  double gain, max_lr, weight_decay, momentum;
  T* buffer;     // flat, where there is momentum
  double* used;  // the learning rate taken
};

template <class T, class P, Momentum kMomentum>
struct Descend {
  static constexpr bool kBuffer = kMomentum != Momentum::kNone;

  Direction<T, kMomentum> direction;
  T rate;
  T* buffer;

  __device__ __forceinline__ bool aligned(const DirectionSegments<P>& table, int segment) const {
    return aligned16(table.data[0][segment]) && aligned16(table.data[1][segment]) &&
           (!kBuffer || aligned16(buffer + table.offset[segment]));
  }

  template <int N>
  __device__ __forceinline__ void group(const DirectionSegments<P>& table, int segment, int64_t i) {
    T theta[N], gradient[N], held[N];
    load(theta, table.data[0][segment] + i);
    load(gradient, table.data[1][segment] + i);
    if constexpr (kBuffer) load(held, buffer + table.offset[segment] + i);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) {
      if constexpr (!kBuffer) held[k] = T(0);
      theta[k] -= product(direction.template of<true>(theta[k], gradient[k], held[k]), rate);
    }
    store(table.data[0][segment] + i, theta);
    if constexpr (kBuffer) store(buffer + table.offset[segment] + i, held);
  }
};

template <class T, class P, Momentum kMomentum>
__global__ void __launch_bounds__(kThreads, 5)
    descend(const __grid_constant__ DirectionSegments<P> table,
            const __grid_constant__ DescendArguments<T> a) {
  // A step that was not finite, or nothing measured yet: stay where we are.
  const double both[2] = {a.state[k_h_ema], factor_of(a.factor)};
  const bool go = a.state[k_accepted] != 0.0 && all_finite(both, 2);
  const double lr = go ? learning_rate(both[0], a.gain * both[1], a.max_lr) : 0.0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.used = lr;
  if (!go) return;
  Descend<T, P, kMomentum> op{
      {static_cast<T>(a.weight_decay), static_cast<T>(a.momentum)}, static_cast<T>(lr), a.buffer};
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
