// θ ← θ − rate·u − Σ_i weight_i·d_i, i ascending. Every block works the weights out for itself.
//
//   newton_descend<T, P, kMomentum>   any grid of kThreads, a launch per table of for_each_table
//                                     (lists: θ, its gradient)
#pragma once

#include "elementwise.cuh"
#include "panel.cuh"

namespace lyapcuda::kernels {

template <class T>
struct NewtonDescendArguments {
  const T* panel;
  int64_t n;
  int k;
  const T* buffer;  // where there is momentum
  const double *state, *slopes, *factor;
  double gain, max_lr, weight_decay, momentum;
  double* used;  // the k + 1 rates
};

template <class T_, class P, Momentum kMomentum>
struct NewtonDescend {
  using T = T_;
  static constexpr bool kBuffer = kMomentum != Momentum::kNone;

  const NewtonDescendArguments<T>& a;
  DirectionFactors<T> factors;
  T rate;
  const T* weights;  // in shared memory
  int rows;
  bool rows_aligned;

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum*) const {
    using V = typename M::Value;
    V held{}, theta = m.read(Listed<0>{});
    const V gradient = m.read(Listed<1>{});
    if constexpr (kBuffer) held = m.read(a.buffer);
    theta = theta - direction<kMomentum, false>(theta, gradient, held, factors) * rate;
    LYAPCUDA_UNROLL_BY(4)
    for (int row = 0; row < rows; ++row) {
      theta = without_row(theta, m.read(a.panel + row * a.n), weights[row]);
    }
    m.write(Listed<0>{}, theta);
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return rows_aligned && is(a.panel) && is(Listed<0>{}) && is(Listed<1>{}) &&
           (!kBuffer || is(a.buffer));
  }
};

template <class T>
struct NewtonDescendMemory {
  double along[kMaxK];
  T weights[kMaxK];
};

template <class T, class P, Momentum kMomentum>
__global__ void __launch_bounds__(kThreads, 4)
    newton_descend(const __grid_constant__ Segments<P, 2> table,
                   const __grid_constant__ NewtonDescendArguments<T> a) {
  using Memory = NewtonDescendMemory<T>;
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
  const NewtonDescend<T, P, kMomentum> op{
      a,
      {static_cast<T>(a.weight_decay), static_cast<T>(a.momentum)},
      static_cast<T>(newton.rate(a.k)),
      memory.weights,
      rows,
      rows <= 1 || a.n % kGroup<T> == 0};
  for_each_group(table, op, nullptr);
}

}  // namespace lyapcuda::kernels
