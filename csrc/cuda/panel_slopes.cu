// torch.ops.lyapcuda.panel_slopes_ on CUDA: kernels/panel_slopes.cuh.
#include "../kernels/panel_slopes.cuh"

#include "direction.h"

namespace lyapcuda::cuda {
namespace {

constexpr int kHeld = 4;  // blocks of a multiprocessor

// Every table of segments is a launch, whose blocks leave a row of sums each.
template <class T, class P, Momentum kMomentum, int kRows>
void slopes_typed(const Launcher& launcher, const std::vector<Tensor>& theta,
                  const std::vector<Tensor>& gradient, const std::vector<int64_t>& offsets,
                  const Tensor& like, kernels::PanelSlopesArguments<T> arguments, double* out) {
  const auto theta_data = beside_written<P>(theta), gradient_data = beside_written<P>(gradient);
  P* const* const lists[2] = {theta_data.data(), gradient_data.data()};
  const auto sizes = sizes_of(theta);
  const Tensor partial = torch::stable::new_empty(
      like, {most_blocks(launcher, sizes.size(), kHeld), int64_t{arguments.k}});
  double* const first_row = written<double>(partial);
  int64_t count = 0;
  kernels::for_each_table(
      lists, sizes.data(), offsets.data(), static_cast<int64_t>(sizes.size()),
      [&](const kernels::DirectionSegments<P>& table) {
        const int64_t blocks = blocks_for(launcher, chunks_of(table), kHeld);
        arguments.partial = first_row + count * arguments.k;
        launcher.run("panel_slopes_", kernels::panel_slopes<T, P, kMomentum, kRows>, blocks,
                     kernels::kThreads, table, arguments);
        count += blocks;
      },
      kernels::kSlopesLength<T, kRows>);
  const double* const to_add = first_row;
  const int last = arguments.k - 1;
  launcher.run("panel_slopes_", kernels::project_finish, kernels::project_finish_blocks(last),
               kernels::kThreads, to_add, count, last, out);
}

Tensor panel_slopes_(std::vector<Tensor> theta, std::vector<Tensor> gradient,
                     std::vector<int64_t> offsets, Tensor panel, Tensor state, double weight_decay,
                     double momentum, bool nesterov, std::optional<Tensor> buffer,
                     std::optional<Tensor> factor) {
  const Device device = device_of(panel, "panel");
  const int64_t k = check_panel_step(theta, gradient, offsets, panel, state,
                                     {weight_decay, momentum, nesterov}, buffer, factor, device);

  const Launcher launcher(device);
  const Tensor out = torch::stable::new_empty(state, {k});
  const ScalarType dtype = theta.empty() ? panel.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(panel.scalar_type(), dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const kernels::PanelSlopesArguments<T> arguments{read<T>(panel),
                                                     panel.size(1),
                                                     static_cast<int>(k),
                                                     buffer ? written<T>(*buffer) : nullptr,
                                                     read<double>(state),
                                                     factor ? read<double>(*factor) : nullptr,
                                                     weight_decay,
                                                     momentum,
                                                     nullptr};
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      kernels::with_rows<16, 33>(k + 1, [&](auto most) {
        slopes_typed<T, P, kind(), most()>(launcher, theta, gradient, offsets, state, arguments,
                                           written<double>(out));
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("panel_slopes_", TORCH_BOX(&lyapcuda::cuda::panel_slopes_));
}
