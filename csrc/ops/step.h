// Checks of what the ops that take a step have in common: parameters, their gradients, a buffer of
// the momentum, the step's factors.
#pragma once

#include <cmath>

#include "../scalars/newton.h"
#include "checks.h"

namespace lyapcuda {

struct StepOptions {
  double weight_decay, momentum;
  bool nesterov;
};

inline void check_rate(double gain, double max_lr) {
  STD_TORCH_CHECK(gain >= 0.0 && std::isfinite(gain), "gain: expected a number of at least 0, got ",
                  gain);
  STD_TORCH_CHECK(max_lr > 0.0 && std::isfinite(max_lr), "max_lr: expected a positive number, got ",
                  max_lr);
}

inline void check_factor(const std::optional<Tensor>& factor, const Device& device) {
  if (factor) check_vector(*factor, "factor", 1, device);
}

inline void check_momentum(const std::optional<Tensor>& buffer, const StepOptions& options) {
  STD_TORCH_CHECK(options.momentum >= 0.0 && options.momentum < 1.0,
                  "momentum: expected [0, 1), got ", options.momentum);
  STD_TORCH_CHECK(buffer || (options.momentum == 0.0 && !options.nesterov),
                  "momentum, nesterov: they need a buffer");
}

// θ beside its gradients, in one dtype, where the op runs.
inline void check_parameters(const std::vector<Tensor>& theta, const std::vector<Tensor>& gradient,
                             const Device& device) {
  check_like(gradient, "gradient", theta, "theta");
  for (size_t i = 0; i < theta.size(); ++i) {
    STD_TORCH_CHECK(is_on(theta[i], device) && theta[i].is_contiguous(), "theta[", i,
                    "]: expected a contiguous ", tensor_on(device));
    STD_TORCH_CHECK(is_on(gradient[i], device) && gradient[i].is_contiguous(), "gradient[", i,
                    "]: expected a contiguous ", tensor_on(device));
    const ScalarType dtype = theta[i].scalar_type();
    STD_TORCH_CHECK(is_buffer_dtype(dtype) || is_storage_dtype(dtype, ScalarType::Float), "theta[",
                    i, "]: dtype ", dtype_name(dtype),
                    " is not float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(dtype == theta[0].scalar_type(), "theta[", i, "]: dtype ", dtype_name(dtype),
                    " differs from theta[0]'s ", dtype_name(theta[0].scalar_type()));
    STD_TORCH_CHECK(gradient[i].scalar_type() == dtype, "gradient[", i, "]: dtype ",
                    dtype_name(gradient[i].scalar_type()), " differs from theta's ",
                    dtype_name(dtype));
  }
}

// A step along θ and the rows of a panel, which lie beside it, as does the buffer.
inline void check_panel_step(const std::vector<Tensor>& theta, const std::vector<Tensor>& gradient,
                             const std::vector<int64_t>& offsets, const Tensor& panel,
                             const Tensor& state, const StepOptions& options,
                             const std::optional<Tensor>& buffer,
                             const std::optional<Tensor>& factor, const Device& device) {
  check_parameters(theta, gradient, device);
  check_panel(panel, "panel", kMaxK, device);
  check_segments(theta, "theta", offsets, panel, device);
  if (buffer) {
    check_buffer(*buffer, "buffer", device);
    check_row_length(*buffer, "buffer", panel, "panel");
    STD_TORCH_CHECK(!overlap(*buffer, panel), "buffer: shares memory with panel");
  }
  const int64_t k = panel.size(0);
  check_vector(state, "state", state_size(k), device);
  check_momentum(buffer, options);
  check_factor(factor, device);
}

// Calls f with an integral constant of the kind.
template <class F>
void with_momentum(Momentum kind, const F& f) {
  switch (kind) {
    case Momentum::kNone:
      return f(std::integral_constant<Momentum, Momentum::kNone>{});
    case Momentum::kHeavy:
      return f(std::integral_constant<Momentum, Momentum::kHeavy>{});
    case Momentum::kNesterov:
      return f(std::integral_constant<Momentum, Momentum::kNesterov>{});
  }
}

// The arithmetic that goes with parameters of a dtype.
inline ScalarType buffer_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace lyapcuda
