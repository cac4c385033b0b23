// Another separation where one was lost: pseudo-random numbers that depend on the seed, the step
// and an element's place alone, so that every backend and any number of threads make the same bits.
#pragma once

#include <cmath>

#include "state.h"

namespace lyapcuda {

// A bijection of 64 bits (the finalizer of splitmix64).
LYAPCUDA_HOST_DEVICE inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t kMixStep = 0x9e3779b97f4a7c15u;

struct Reseed {
  int64_t row;  // -1: none is lost
  double size;  // of an element, as a factor of element()
  uint64_t key;

  // In (-1, -1/2] or [1/2, 1): no direction is nearly zero, however few elements there are.
  LYAPCUDA_HOST_DEVICE double element(int64_t place) const {
    const uint64_t bits = mix_bits(key + kMixStep * (static_cast<uint64_t>(place) + 1));
    const double size = 0.5 + mul(static_cast<double>(bits >> 12), 1.0 / 9007199254740992.0);
    return bits & 1 ? -size : size;
  }
};

// What the state of k separations asks for; `elements` of all segments make up the norm.
LYAPCUDA_HOST_DEVICE inline Reseed reseed_of(const double* state, int64_t k, int64_t elements,
                                             int64_t seed) {
  const auto field = [&](StateScalar name) { return state[state_offset(name)]; };
  const double row = field(StateScalar::reseed);
  if (!(row >= 1.0 && row <= static_cast<double>(k))) return {-1, 0.0, 0};
  double norm = field(StateScalar::perturbation);
  // A single separation is transform times its buffer.
  const double scale = state[state_offset(StateMatrix::transform, k)];
  if (k == 1 && std::isfinite(norm / scale)) norm = std::fabs(norm / scale);
  // Elements of +-[1/2, 1) have a mean square of 7/12.
  const double size = norm / std::sqrt(7.0 / 12.0 * static_cast<double>(elements));
  const double taken = field(StateScalar::steps) + field(StateScalar::skipped);
  const uint64_t key = static_cast<uint64_t>(seed) + kMixStep * static_cast<uint64_t>(taken);
  return {static_cast<int64_t>(row) - 1, size, mix_bits(key)};
}

}  // namespace lyapcuda
