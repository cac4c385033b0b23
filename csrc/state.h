// The device-resident scalars of one tracker: a float64 vector, one slot a field.
//
// Everything a step decides (growth, ascent rate, curvature, whether the new separation counts)
// lives here, so that no step has to wait for the device. Python reads the names through
// lyapcuda._C.state_fields(), so the two can't drift apart.
#pragma once

#include <cstdint>

// clang-format off
#define LYAPCUDA_STATE_FIELDS(X)                                                       \
  X(perturbation) /* Δq: the norm a separation is brought back to */                   \
  X(scale)        /* q = scale · (the buffer of the separation) */                    \
  X(beta)         /* the ascent rate of the next step */                               \
  X(exponent)     /* λ = log(‖d‖/‖q‖) of the last accepted step */                     \
  X(h)            /* the curvature, by the estimate chosen */                          \
  X(h_ema)        /* its exponential moving average */                                 \
  X(rayleigh)     /* ρ = q·y/‖q‖² */                                                   \
  X(residual)     /* r = ‖y − ρq‖/‖q‖ */                                               \
  X(center)       /* the middle of the error bar: ρ, or its mean over both sides of θ */ \
  X(width)        /* half the length of the error bar */                               \
  X(bound)        /* the recent largest ‖y‖/‖q‖, a lower bound of ‖H‖ */               \
  X(guard)        /* the largest where q had settled on the unwanted end */            \
  X(committed)    /* 1: the last step's d replaces q; 0: the old q stays */            \
  X(accepted)     /* 1: the last step was finite and its values were taken */          \
  X(steps)        /* how many steps were accepted */                                   \
  X(skipped)      /* how many were not */                                              \
  X(reseed)       /* 1: the separation is lost, reseed_ is to make another */          \
  X(reseeds)      /* how often that was so */
// clang-format on

namespace lyapcuda {

enum StateField : int64_t {
#define LYAPCUDA_ENUM(name) k_##name,
  LYAPCUDA_STATE_FIELDS(LYAPCUDA_ENUM)
#undef LYAPCUDA_ENUM
      kStateSize
};

// The sums that one pass over the separation leaves behind. `q` is the displacement the gradients
// really saw, `carried` the separation kept in full precision: they differ only for bf16/fp16
// parameters, where θ + q is rounded.
enum SumField : int64_t {
  kSumDD,        // Σ d²
  kSumQQ,        // Σ q²
  kSumQY,        // Σ q·y
  kSumYY,        // Σ y²
  kSumCarriedQ,  // Σ carried·q
  kSumCarriedY,  // Σ carried·y
  kSumSize
};

}  // namespace lyapcuda
