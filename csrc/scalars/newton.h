// The scalars of the quasi-Newton steps: curvatures → learning rates, and for k separations the
// weights of the rows that the step is corrected by. Plain functions, shared by every backend.
#pragma once

#include <cmath>

#include "growth.h"
#include "state.h"

namespace lyapcuda {

// What a direction is made of: g = gradient + weight_decay·θ, buffer = momentum·buffer + g, and the
// step goes along buffer, or with Nesterov's look ahead along g + momentum·buffer.
enum class Momentum { kNone, kHeavy, kNesterov };

inline Momentum momentum_kind(bool buffer, bool nesterov) {
  return !buffer ? Momentum::kNone : nesterov ? Momentum::kNesterov : Momentum::kHeavy;
}

// The learning rate of curvature h: gain/h, or gain·max_lr where that is less or h ≤ 0.
LYAPCUDA_HOST_DEVICE inline double learning_rate(double h, double gain, double max_lr) {
  return h * max_lr > 1.0 ? gain / h : gain * max_lr;
}

// The factor of a gain: 1 without one. Where it isn't finite there is no step.
LYAPCUDA_HOST_DEVICE inline double factor_of(const double* factor) {
  return factor == nullptr ? 1.0 : *factor;
}

// --- k separations -------------------------------------------------------------------------------
// q_j = Σ_i d_i·transform[i][j], orthogonal and of norm Δq, belongs to the curvature h_j; `slopes`
// are the products of the rows of d with the direction u. The step is
//   rest·u + Σ_j (rate_j − rest)·q_j (q_j·u)/Δq² = rest·u + Σ_i weight_i·d_i.

struct Newton {
  const double* state;
  int64_t k;
  double gain, max_lr;

  LYAPCUDA_HOST_DEVICE double scalar(StateScalar field) const {
    return state[state_offset(field, k)];
  }
  LYAPCUDA_HOST_DEVICE const double* vector(StateVector field) const {
    return state + state_offset(field, k);
  }
  // Whether there are vectors that belong to the curvatures: not where the copies met.
  LYAPCUDA_HOST_DEVICE bool has_vectors() const { return scalar(StateScalar::pending) != 0.0; }

  // Whether there is a step at all.
  LYAPCUDA_HOST_DEVICE bool go(double factor) const {
    return scalar(StateScalar::accepted) != 0.0 && all_finite(&factor, 1) &&
           all_finite(vector(StateVector::h_ema), k);
  }

  // The curvature off the tracked directions. Along those that aren't tracked nothing is larger
  // than the k-th value once the vectors have converged. Until then, or on another minibatch, its
  // residual says how much more there may be.
  LYAPCUDA_HOST_DEVICE double rest() const {
    const double h = std::fabs(vector(StateVector::h_ema)[k - 1]);
    const double residual = vector(StateVector::residual)[k - 1];
    return h + residual;
  }

  // Of value j; j = k: off the tracked directions. Along none is the step longer than there.
  LYAPCUDA_HOST_DEVICE double rate(int64_t j) const {
    double h = rest();
    const double* const all = vector(StateVector::h_ema);
    if (j < k) {
      h = std::fmax(h, std::fabs(all[j]));
    } else if (!has_vectors()) {
      for (int64_t i = 0; i < k; ++i) h = std::fmax(h, std::fabs(all[i]));
    }
    return learning_rate(h, gain, max_lr);
  }

  // (rate_j − rest)·(q_j·u)/Δq².
  LYAPCUDA_HOST_DEVICE double along(const double* slopes, int64_t j) const {
    const double* const transform = state + state_offset(StateMatrix::transform, k);
    const double size = scalar(StateScalar::perturbation);
    double slope = 0.0;
    for (int64_t i = 0; i < k; ++i) slope += mul(transform[i * k + j], slopes[i]);
    return (rate(j) - rate(k)) * slope / (size * size);
  }

  LYAPCUDA_HOST_DEVICE double weight(const double* along, int64_t i) const {
    const double* const transform = state + state_offset(StateMatrix::transform, k);
    double weight = 0.0;
    for (int64_t j = 0; j < k; ++j) weight += mul(transform[i * k + j], along[j]);
    return weight;
  }
};

}  // namespace lyapcuda
