// What the tests of the kernels on panels share.
#pragma once

#include <stdexcept>

#include "../kernels/panel_gram.cuh"
#include "simt_support.h"

namespace lyapcuda::test {

// k rows of n elements.
template <class T>
struct Panel {
  int k;
  int64_t n;
  Walled<T> array;

  Panel(int rows, int64_t length, int64_t shift, int64_t behind)
      : k(rows), n(length), array(rows * length, shift, behind) {}

  T* data() { return array.data(); }
  T& at(int j, int64_t i) { return array[j * n + i]; }
  const T& at(int j, int64_t i) const { return array[j * n + i]; }
  void take(const Panel& other) { std::memcpy(data(), other.array.data(), k * n * sizeof(T)); }
  // Nothing but the segments was written.
  bool gaps_untouched(const Layout& layout) const {
    if (!array.whole()) return false;
    for (int j = 0; j < k; ++j) {
      int64_t end = 0;
      for (int64_t s = 0; s <= layout.count(); ++s) {
        const int64_t begin = s < layout.count() ? layout.offsets[s] : layout.total;
        if (!array.untouched(j * n + end, j * n + begin)) return false;
        if (s < layout.count()) end = begin + layout.sizes[s];
      }
    }
    return true;
  }
};

// A sum in long double, and how large its terms were.
struct Sum {
  long double value = 0, magnitude = 0;
  void add(double a, double b) {
    value += static_cast<long double>(a) * b;
    magnitude += std::fabs(static_cast<long double>(a) * b);
  }
  bool near(double other) const { return std::fabs(value - other) <= 1e-14L * magnitude; }
};

// Whether `right` fails in one order of threads at least, or the emulator reports the fault, when
// the given barrier of the given one of its launches is missing. A test that can't see that proves
// nothing.
template <class Right>
bool sees_missing_barrier(int number, const Right& right, int launch = 0) {
  bool seen = false;
  for (const simt::Order order : kOrders) {
    simt::missing_barrier = {launch, number};
    try {
      seen = !right(order) || seen;
    } catch (const std::runtime_error&) {
      seen = true;
    }
    simt::missing_barrier = {};
  }
  return seen;
}

}  // namespace lyapcuda::test
