// torch.ops.lyapcuda.panel_descend_ on CUDA: kernels/panel_descend.cuh.
#include "../kernels/panel_descend.cuh"

#include "direction.h"

namespace lyapcuda::cuda {
namespace {

Tensor panel_descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient,
                      std::vector<int64_t> offsets, Tensor panel, Tensor state, Tensor slopes,
                      double gain, double max_lr, double weight_decay, double momentum,
                      bool nesterov, std::optional<Tensor> buffer, std::optional<Tensor> factor) {
  const Device device = device_of(panel, "panel");
  const int64_t k = check_panel_step(theta, gradient, offsets, panel, state,
                                     {weight_decay, momentum, nesterov}, buffer, factor, device);
  check_vector(slopes, "slopes", k, device);
  check_rate(gain, max_lr);

  const Launcher launcher(device);
  const Tensor out = torch::stable::new_empty(state, {k + 1});
  const ScalarType dtype = theta.empty() ? panel.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(panel.scalar_type(), dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const kernels::PanelDescendArguments<T> arguments{read<T>(panel),
                                                      panel.size(1),
                                                      static_cast<int>(k),
                                                      buffer ? read<T>(*buffer) : nullptr,
                                                      read<double>(state),
                                                      read<double>(slopes),
                                                      factor ? read<double>(*factor) : nullptr,
                                                      gain,
                                                      max_lr,
                                                      weight_decay,
                                                      momentum,
                                                      written<double>(out)};
    const auto theta_data = data_of<P>(theta);
    const auto gradient_data = beside_written<P>(gradient);
    P* const* const lists[2] = {theta_data.data(), gradient_data.data()};
    const auto sizes = sizes_of(theta);
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      // Without any tensor there is one launch all the same: it writes the rates.
      kernels::for_each_table(lists, sizes.data(), offsets.data(),
                              static_cast<int64_t>(sizes.size()),
                              [&](const kernels::DirectionSegments<P>& table) {
                                launcher.run("panel_descend_", kernels::panel_descend<T, P, kind()>,
                                             blocks_for(launcher, chunks_of(table), 4),
                                             kernels::kThreads, table, arguments);
                              });
    });
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("panel_descend_", TORCH_BOX(&lyapcuda::cuda::panel_descend_));
}
