// What one block of difference_ works on; free of torch, so that the C++ tests can call the bodies.
#pragma once

namespace lyapcuda::cpu {

template <class T, class P>
struct DifferenceArguments {
  T* out;
  const P *plus, *minus;
  const T* v;
};

struct DifferenceScalars {
  double scale, weight_decay, keep;
};

}  // namespace lyapcuda::cpu
