// The step of a copy, seen from its separation. Included once an instruction set, and for CUDA.
//
//   moved = carried
//   y = (g1 − g0) + weight_decay·moved      moved: the displacement that the gradients saw
//   w = momentum·p + y
//   d = carried + rate·w
//
// With a diagonal metric S carried is a separation in the coordinates where the curvature is S·H·S,
// and the copy lies at θ + displacement·S·carried:
//
//   y = S·((g1 − g0) + weight_decay·moved)/displacement
//
// and what the gradients saw goes on, as moved/(displacement·S), in the coordinates of carried.

template <class T>
struct AscentFactors {
  T rate, weight_decay, momentum;
  T displacement, inverse;  // of this copy; with a metric alone
};

template <class V>
struct AscentValues {
  V carried, moved, y, w, d;
};

// What goes beside the separations: θ where the displacement is realised, p with momentum.
template <class V>
struct AscentStreams {
  V g0, g1, theta, p, metric;
};

// What is added to θ.
template <class V, class T>
LYAPCUDA_INLINE V displaced(V carried, V metric, T displacement) {
  return carried * (metric * displacement);
}

// kRealised: what recenter_ wrote was rounded to P, and θ is given.
template <class P, bool kRealised, bool kMomentum, bool kMetric, class V, class T>
LYAPCUDA_INLINE AscentValues<V> ascent_values(V carried, const AscentStreams<V>& of,
                                              const AscentFactors<T>& by) {
  V moved = carried;
  if constexpr (kMetric) moved = displaced(carried, of.metric, by.displacement);
  if constexpr (kRealised) moved = round_to<P>(of.theta + moved) - of.theta;
  V y = (of.g1 - of.g0) + moved * by.weight_decay;
  if constexpr (kMetric) {
    y = (y * of.metric) * by.inverse;
    if constexpr (kRealised) moved = quotient_or_zero(moved, of.metric * by.displacement);
  }
  V w = y;
  if constexpr (kMomentum) w = of.p * by.momentum + y;
  return {carried, moved, y, w, carried + w * by.rate};
}
