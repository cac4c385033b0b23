// torch.ops.lyapcuda.benettin_ and benettin_refine_ on CUDA: one block.
#include "../kernels/benettin.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void check_panel_count(int64_t k) {
  STD_TORCH_CHECK(k >= 1 && k <= kMaxPanel, "k: expected 1 to ", kMaxPanel, ", got ", k);
}

void benettin_(Tensor state, Tensor gram, Tensor losses, int64_t k, int64_t sign, int64_t estimate,
               double momentum, bool realised, bool control, bool alternate, bool rotate,
               double ema) {
  const Device device = device_of(state, "state");
  check_panel_count(k);
  check_vector(state, "state", panel_size(k), device);
  check_step_options(sign, estimate, momentum, ema);
  const int64_t stacked = (2 + realised + (momentum > 0.0)) * k;
  check_matrix(gram, "gram", stacked, stacked, device);
  check_vector(losses, "losses", device);
  const BenettinOptions options{{static_cast<double>(sign), static_cast<Estimate>(estimate),
                                 momentum, control, alternate, ema},
                                realised,
                                rotate};
  const Launcher launcher(device);
  launcher.run("benettin_", kernels::benettin, 1, kernels::kThreads, written<double>(state),
               read<double>(gram), read<double>(losses), static_cast<int>(losses.numel()),
               static_cast<int>(k), options);
}

void benettin_refine_(Tensor state, Tensor gram, int64_t k) {
  const Device device = device_of(state, "state");
  check_panel_count(k);
  check_vector(state, "state", panel_size(k), device);
  check_matrix(gram, "gram", k, k, device);
  const Launcher launcher(device);
  launcher.run("benettin_refine_", kernels::benettin_refine, 1, kernels::kThreads,
               written<double>(state), read<double>(gram), static_cast<int>(k));
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("benettin_", TORCH_BOX(&lyapcuda::cuda::benettin_));
  m.impl("benettin_refine_", TORCH_BOX(&lyapcuda::cuda::benettin_refine_));
}
