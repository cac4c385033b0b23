// torch.ops.lyapcuda.exponent_ and secant_: from the sums of a pass to λ, β, h and the error bar.
#include "../exponent.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace lyapcuda::cpu {
namespace {

void exponent_(Tensor state, Tensor sums, Tensor losses, int64_t sign, int64_t estimate,
               double momentum, bool control, bool alternate, double ema) {
  check_vector(state, "state", kStateSize);
  check_vector(sums, "sums", kSumSize);
  check_vector(losses, "losses");
  check_step_options(sign, estimate, momentum, ema);
  exponent_step(static_cast<double*>(state.mutable_data_ptr()),
                static_cast<const double*>(sums.const_data_ptr()),
                static_cast<const double*>(losses.const_data_ptr()), losses.numel(),
                {static_cast<double>(sign), static_cast<Estimate>(estimate), momentum, control,
                 alternate, ema});
}

void secant_(Tensor state, Tensor sums, int64_t sign) {
  check_vector(state, "state", kStateSize);
  check_vector(sums, "sums", kSumSize);
  check_sign(sign);
  const double* s = static_cast<const double*>(sums.const_data_ptr());
  if (!usable(s)) return;
  secant_rate(static_cast<double*>(state.mutable_data_ptr()), quotient(s),
              static_cast<double>(sign));
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("exponent_", TORCH_BOX(&lyapcuda::cpu::exponent_));
  m.impl("secant_", TORCH_BOX(&lyapcuda::cpu::secant_));
}
