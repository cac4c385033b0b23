// The direction of a step: what the bodies that take or measure one work on; free of torch, so that
// the C++ tests can call them.
#pragma once

#include <cstdint>

#include "../newton.h"

namespace lyapcuda::cpu {

template <class T, class P>
struct DirectionArguments {
  P* theta;
  const P* gradient;
  T* buffer;  // of the momentum, where there is one
};

struct DirectionScalars {
  double weight_decay, momentum;
};

template <class T>
struct PanelRows {
  const T* panel;
  int64_t rows, row;
};

}  // namespace lyapcuda::cpu
