// The direction u of a step, element by element (newton.h says which); the arithmetic is that of
// cpu/direction.inc, to the bit.
#pragma once

#include "../newton.h"
#include "segments.cuh"

namespace lyapcuda::kernels {

template <class P>
using DirectionSegments = Segments<P, 2>;  // θ, its gradient

template <class T, Momentum kMomentum>
struct Direction {
  T weight_decay, momentum;

  // kAdvance: the buffer takes the gradient in first.
  template <bool kAdvance>
  __device__ __forceinline__ T of(T theta, T gradient, T& buffer) const {
    const T g = gradient + product(theta, weight_decay);
    if constexpr (kMomentum == Momentum::kNone) {
      return g;
    } else {
      if constexpr (kAdvance) buffer = product(buffer, momentum) + g;
      if constexpr (kMomentum == Momentum::kHeavy) return buffer;
      return g + product(buffer, momentum);
    }
  }
};

}  // namespace lyapcuda::kernels
