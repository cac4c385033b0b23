// The Gram matrix that a step with k separations leaves: of the rows carried, y, (moved), (d),
// stacked, k of each. Its blocks, and what follows from them, as functions of row and column.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace lyapcuda {

// The Gram matrix, block by block.
struct StackedGram {
  const double* data;
  int k, blocks;        // of k rows each
  int y = 1, moved, d;  // which block is which (0: carried); d = −1: follows from the others

  LYAPCUDA_HOST_DEVICE StackedGram(const double* gram, int size, bool realised, bool heavy)
      : data(gram),
        k(size),
        blocks(2 + realised + heavy),
        moved(realised ? 2 : 0),
        d(heavy ? 2 + realised : -1) {}

  LYAPCUDA_HOST_DEVICE double at(int a, int i, int b, int j) const {
    return data[(a * k + i) * blocks * k + b * k + j];
  }
};

struct GramBlock {  // one block of it, or its symmetric part
  const StackedGram& gram;
  int a, b;
  bool symmetric;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const {
    const double value = gram.at(a, i, b, j);
    return symmetric ? mul(0.5, value + gram.at(a, j, b, i)) : value;
  }
};

struct NextGram {  // that of D = C + rate·Y
  const StackedGram& gram;
  double rate;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const {
    if (gram.d >= 0) return gram.at(gram.d, i, gram.d, j);
    const double cross = gram.at(0, i, gram.y, j) + gram.at(0, j, gram.y, i);
    return (gram.at(0, i, 0, j) + mul(rate, cross)) + mul(mul(rate, rate), gram.at(1, i, 1, j));
  }
};

template <class T>
LYAPCUDA_HOST_DEVICE constexpr double largest_of() {
  return sizeof(T) == sizeof(float) ? double{FLT_MAX} : DBL_MAX;
}

// An element of d may not fit the panel's dtype although the Gram matrix without momentum, which
// has no rows of d, is finite: such a step must not be taken. Marks y's diagonal for one thread.
LYAPCUDA_HOST_DEVICE inline void refuse_overflow(double* gram, int k, bool realised, bool heavy,
                                                 double rate, double largest) {
  const StackedGram stack(gram, k, realised, heavy);
  const NextGram next{stack, rate};
  for (int j = 0; j < k; ++j) {
    // (Rounding can only bring a square below zero where d is nothing but rounding.)
    const double square = next(j, j);
    if (square < 0.0 || std::sqrt(square) < largest) continue;
    const int64_t row = int64_t{k} + j, rows = int64_t{stack.blocks} * k;
    gram[row * rows + row] = INFINITY;
  }
}

}  // namespace lyapcuda
