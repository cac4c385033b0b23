// What one block of ascent_ works on; free of torch, so that the C++ tests can call the bodies.
#pragma once

namespace lyapcuda::cpu {

template <class T, class P>
struct AscentArguments {
  T* d;
  const T* q;
  const P *g0, *g1, *theta;
  const T* p;
  T* p_next;
};

struct AscentScalars {
  double scale, rate, weight_decay, momentum;
};

// Whether Σ d² is summed or follows from the other sums, whose last digits are then all it has
// where d nearly vanishes: enough for the 24 bits of a float d, not for a double's.
template <class T, bool kRealised, bool kMomentum>
constexpr bool kSumsD = kRealised || kMomentum || sizeof(T) == sizeof(double);

}  // namespace lyapcuda::cpu
