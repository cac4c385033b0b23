// The direction u of a step (newton.h says which). Included once an instruction set, and for CUDA.

template <class T>
struct DirectionFactors {
  T weight_decay, momentum;
};

// From θ, the gradient and the momentum's buffer; kAdvance: the buffer takes the gradient in first.
template <Momentum kMomentum, bool kAdvance, class V, class T>
LYAPCUDA_INLINE V direction(V theta, V gradient, V& buffer, const DirectionFactors<T>& by) {
  const V g = gradient + theta * by.weight_decay;
  if constexpr (kMomentum == Momentum::kNone) {
    return g;
  } else {
    if constexpr (kAdvance) buffer = buffer * by.momentum + g;
    if constexpr (kMomentum == Momentum::kHeavy) return buffer;
    return g + buffer * by.momentum;
  }
}
