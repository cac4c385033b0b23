// The step of a copy, seen from its separation. Included once an instruction set, and for CUDA.
//
//   y = g1 − g0 + weight_decay·moved    moved: the displacement that the gradients saw
//   w = momentum·p + y
//   d = carried + rate·w
//
// A diagonal metric would be one stream more here: y times its values.

template <class T>
struct AscentFactors {
  T rate, weight_decay, momentum;
};

template <class V>
struct AscentValues {
  V carried, moved, y, w, d;
};

// kRealised: what recenter_ wrote was rounded to P, and θ is given; else moved is carried.
template <class P, bool kRealised, bool kMomentum, class V, class T>
LYAPCUDA_INLINE AscentValues<V> ascent_values(V carried, V g0, V g1, V theta, V p,
                                              const AscentFactors<T>& by) {
  V moved = carried;
  if constexpr (kRealised) moved = round_to<P>(theta + carried) - theta;
  const V y = (g1 - g0) + moved * by.weight_decay;
  V w = y;
  if constexpr (kMomentum) w = p * by.momentum + y;
  return {carried, moved, y, w, carried + w * by.rate};
}
