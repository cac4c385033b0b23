// θ ← θ − rate·u − Σ_i weight_i·d_i, i ascending; the arithmetic of an element is that of
// cpu/panel_descend.inc, to the bit. Every block works the weights out for itself.
#pragma once

#include "direction.cuh"
#include "panel.cuh"

namespace lyapcuda::kernels {

template <class T>
struct PanelDescendArguments {
  const T* panel;
  int64_t n;
  int k;
  const T* buffer;  // where there is momentum
  const double *state, *slopes, *factor;
  double gain, max_lr, weight_decay, momentum;
  double* used;  // the k + 1 rates
};

template <class T, class P, Momentum kMomentum>
struct PanelDescend {
  static constexpr bool kBuffer = kMomentum != Momentum::kNone;

  const PanelDescendArguments<T>& a;
  Direction<T, kMomentum> direction;
  T rate;
  const T* weights;  // in shared memory
  int rows;
  bool rows_aligned;

  __device__ __forceinline__ bool aligned(const DirectionSegments<P>& table, int segment) const {
    const int64_t at = table.offset[segment];
    return rows_aligned && aligned16(a.panel + at) && aligned16(table.data[0][segment]) &&
           aligned16(table.data[1][segment]) && (!kBuffer || aligned16(a.buffer + at));
  }

  template <int N>
  __device__ __forceinline__ void group(const DirectionSegments<P>& table, int segment, int64_t i) {
    const int64_t at = table.offset[segment] + i;
    T theta[N], gradient[N], held[N];
    load(theta, table.data[0][segment] + i);
    load(gradient, table.data[1][segment] + i);
    if constexpr (kBuffer) load(held, a.buffer + at);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) {
      if constexpr (!kBuffer) held[k] = T(0);
      theta[k] -= product(direction.template of<false>(theta[k], gradient[k], held[k]), rate);
    }
    LYAPCUDA_UNROLL_BY(4)
    for (int row = 0; row < rows; ++row) {
      T along[N];
      load(along, a.panel + row * a.n + at);
      LYAPCUDA_UNROLL
      for (int k = 0; k < N; ++k) theta[k] -= product(along[k], weights[row]);
    }
    store(table.data[0][segment] + i, theta);
  }
};

template <class T>
struct PanelDescendMemory {
  double along[kMaxPanel];
  T weights[kMaxPanel];
};

template <class T, class P, Momentum kMomentum>
__global__ void __launch_bounds__(kThreads, 4)
    panel_descend(const __grid_constant__ DirectionSegments<P> table,
                  const __grid_constant__ PanelDescendArguments<T> a) {
  using Memory = PanelDescendMemory<T>;
  LYAPCUDA_SHARED(Memory, memory);
  const double factor = factor_of(a.factor);
  const Newton newton{a.state, a.k, a.gain * factor, a.max_lr};
  const bool go = newton.go(factor) && all_finite(a.slopes, a.k);
  const int i = threadIdx.x;
  if (blockIdx.x == 0 && i <= a.k) a.used[i] = go ? newton.rate(i) : 0.0;
  if (!go) return;  // all threads alike
  const int rows = newton.has_vectors() ? a.k : 0;
  if (i < rows) memory.along[i] = newton.along(a.slopes, i);
  __syncthreads();
  if (i < rows) memory.weights[i] = static_cast<T>(newton.weight(memory.along, i));
  __syncthreads();
  PanelDescend<T, P, kMomentum> op{a,
                                   {static_cast<T>(a.weight_decay), static_cast<T>(a.momentum)},
                                   static_cast<T>(newton.rate(a.k)),
                                   memory.weights,
                                   rows,
                                   rows <= 1 || a.n % kGroup<T> == 0};
  for_each_group(table, op);
}

}  // namespace lyapcuda::kernels
