// torch.ops.lyapcuda.lyapunov_step_: ascent_, exponent_ and recenter_ in turn, at a θ that stays.
#include <torch/csrc/stable/library.h>

#include "step.h"

namespace lyapcuda::cpu {
namespace {

void lyapunov_step_(std::vector<Tensor> theta1, Tensor q, std::vector<Tensor> g0,
                    std::vector<Tensor> g1, std::vector<Tensor> theta, std::vector<int64_t> offsets,
                    Tensor state, Tensor losses, int64_t sign, int64_t estimate, bool control,
                    bool alternate, double ema, double weight_decay, bool realised) {
  check_buffer(q, "q");
  check_segments(theta, "theta", offsets, q);
  check_segments(theta1, "theta1", offsets, q);
  check_like(theta1, "theta1", theta, "theta");
  check_segments(g0, "g0", offsets, q);
  check_like(g0, "g0", theta, "theta");
  check_segments(g1, "g1", offsets, q);
  check_like(g1, "g1", theta, "theta");
  check_vector(state, "state", kStateSize);
  check_vector(losses, "losses");
  check_step_options(sign, estimate, 0.0, ema);

  const Tensor d = torch::stable::empty_like(q);
  std::optional<std::vector<Tensor>> moved;
  if (realised) moved = theta;
  const Tensor sums = ascent_(d, q, g0, g1, offsets, state, sign, weight_decay, moved, 0.0,
                              std::nullopt, std::nullopt);
  exponent_(state, sums, losses, sign, estimate, 0.0, control, alternate, ema);
  if (theta.empty()) return;
  const double* const values = static_cast<const double*>(state.const_data_ptr());
  recenter_segments(theta1, q, d, theta, offsets, values[k_scale], values[k_committed] == 0.0);
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("lyapunov_step_", TORCH_BOX(&lyapcuda::cpu::lyapunov_step_));
}
