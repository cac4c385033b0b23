// The device-resident numbers of k separations, k ≥ 1: a float64 vector of scalars, then vectors of
// k, then row-major k×k matrices. Everything a step decides lives here, so that no step has to wait
// for the device. Python reads names, offsets and shapes through lyapcuda._C.state_fields(k).
//
// k = 1 keeps its separation as transform·q, k > 1 as the rows of q: see pending.
#pragma once

#include <cstdint>

#include "host_device.h"

// clang-format off
#define LYAPCUDA_STATE_SCALARS(X)                                                        \
  X(perturbation) /* Δq: the norm every separation is brought back to */                \
  X(beta)         /* the ascent rate of the next step */                                 \
  X(bound)        /* the recent largest ‖y‖/‖q‖, a lower bound of ‖H‖ */                 \
  X(guard)        /* the largest where a vector had settled on the unwanted end */       \
  X(pending)      /* 1: the separations are what the last step wrote, by transform; 0: q */ \
  X(again)        /* 1: ... and a second pass of orthonormalisation comes before that */ \
  X(accepted)     /* 1: the last step was finite and its values were taken */            \
  X(steps)        /* how many steps were accepted */                                     \
  X(skipped)      /* how many were not */                                                \
  X(reseed)       /* 1 + the row that is lost: reseed_ is to make another; 0: none */    \
  X(reseeds)      /* how often that was so */                                            \
  X(refined)      /* 1: the step that comes took further gradients; `first` is from before */

// Entry i belongs to the i-th Ritz value: descending for an ascent, ascending for a descent.
#define LYAPCUDA_STATE_VECTORS(X)                                                        \
  X(exponent) /* λ_i = log(R_ii/‖q_i‖) of the last step whose transform was found */     \
  X(h)        /* the curvatures, by the estimate chosen */                               \
  X(h_ema)    /* their exponential moving averages */                                    \
  X(rayleigh) /* the Ritz values */                                                      \
  X(residual) /* ‖y − ρq‖/‖q‖ of each Ritz vector */                                     \
  X(center)   /* the middle of the error bar: ρ, or its mean over both sides of θ */     \
  X(width)    /* half the length of the error bar */                                     \
  X(first)    /* the residual over ‖y‖/‖q‖, before further gradients */                  \
  X(error)    /* how far h may be off: nine times in ten it is less */                   \
  X(displacement) /* with a diagonal metric S, copy j lies at θ + displacement_j·S∘q_j */

#define LYAPCUDA_STATE_MATRICES(X)                                                       \
  X(r)         /* R of the last step's QR, upper triangular */                           \
  X(transform) /* what the rows of d are combined with: q_j = Σ_i d_i·transform[i][j] */
// clang-format on

namespace lyapcuda {

constexpr int64_t kMaxK = 32;      // separations
constexpr int64_t kMaxRows = 128;  // rows of a panel in gram, combine_ and project_

enum class StateScalar : int64_t {
#define LYAPCUDA_ENUM(name) name,
  LYAPCUDA_STATE_SCALARS(LYAPCUDA_ENUM)
#undef LYAPCUDA_ENUM
      kCount
};
enum class StateVector : int64_t {
#define LYAPCUDA_ENUM(name) name,
  LYAPCUDA_STATE_VECTORS(LYAPCUDA_ENUM)
#undef LYAPCUDA_ENUM
      kCount
};
enum class StateMatrix : int64_t {
#define LYAPCUDA_ENUM(name) name,
  LYAPCUDA_STATE_MATRICES(LYAPCUDA_ENUM)
#undef LYAPCUDA_ENUM
      kCount
};

// Where a field starts in the state of k separations.
LYAPCUDA_HOST_DEVICE constexpr int64_t state_offset(StateScalar field, int64_t = 0) {
  return static_cast<int64_t>(field);
}
LYAPCUDA_HOST_DEVICE constexpr int64_t state_offset(StateVector field, int64_t k) {
  return state_offset(StateScalar::kCount) + static_cast<int64_t>(field) * k;
}
LYAPCUDA_HOST_DEVICE constexpr int64_t state_offset(StateMatrix field, int64_t k) {
  return state_offset(StateVector::kCount, k) + static_cast<int64_t>(field) * k * k;
}
LYAPCUDA_HOST_DEVICE constexpr int64_t state_size(int64_t k) {
  return state_offset(StateMatrix::kCount, k);
}

// The fields of one state.
struct State {
  double* state;
  int k;
  LYAPCUDA_HOST_DEVICE double& operator()(StateScalar field) const {
    return state[state_offset(field)];
  }
  LYAPCUDA_HOST_DEVICE double& operator()(StateVector field, int i) const {
    return state[state_offset(field, k) + i];
  }
  LYAPCUDA_HOST_DEVICE double& operator()(StateMatrix field, int i, int j) const {
    return state[state_offset(field, k) + i * k + j];
  }
};

}  // namespace lyapcuda
