// torch.ops.lyapcuda.exponent_ and secant_ on CUDA: one thread, so that nothing is read back.
#include "../kernels/exponent.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void exponent_(Tensor state, Tensor sums, Tensor losses, int64_t sign, int64_t estimate,
               double momentum, bool control, bool alternate, double ema) {
  const Device device = device_of(state, "state");
  check_vector(state, "state", kStateSize, device);
  check_vector(sums, "sums", kSumSize, device);
  check_vector(losses, "losses", device);
  check_step_options(sign, estimate, momentum, ema);
  const ExponentOptions options{static_cast<double>(sign),
                                static_cast<Estimate>(estimate),
                                momentum,
                                control,
                                alternate,
                                ema};
  const Launcher launcher(device);
  launcher.run("exponent_", kernels::exponent, 1, 32, written<double>(state), read<double>(sums),
               read<double>(losses), losses.numel(), options);
}

void secant_(Tensor state, Tensor sums, int64_t sign) {
  const Device device = device_of(state, "state");
  check_vector(state, "state", kStateSize, device);
  check_vector(sums, "sums", kSumSize, device);
  check_sign(sign);
  const Launcher launcher(device);
  launcher.run("secant_", kernels::secant, 1, 32, written<double>(state), read<double>(sums),
               static_cast<double>(sign));
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("exponent_", TORCH_BOX(&lyapcuda::cuda::exponent_));
  m.impl("secant_", TORCH_BOX(&lyapcuda::cuda::secant_));
}
