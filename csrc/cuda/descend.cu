// torch.ops.lyapcuda.descend_ on CUDA: kernels/descend.cuh.
#include "../kernels/descend.cuh"

#include "direction.h"

namespace lyapcuda::cuda {
namespace {

Tensor descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient, Tensor state, double gain,
                double max_lr, double weight_decay, double momentum, bool nesterov,
                std::optional<Tensor> buffer, std::optional<std::vector<int64_t>> offsets,
                std::optional<Tensor> factor) {
  const Device device = device_of(state, "state");
  const StepOptions options{weight_decay, momentum, nesterov};
  check_vector(state, "state", kStateSize, device);
  check_parameters(theta, gradient, device);
  check_rate(gain, max_lr);
  check_momentum(buffer, options);
  check_factor(factor, device);
  STD_TORCH_CHECK(buffer.has_value() == offsets.has_value(), "buffer, offsets: give both or none");
  if (buffer) {
    check_buffer(*buffer, "buffer", device);
    check_segments(theta, "theta", *offsets, *buffer, device);
  }

  const Launcher launcher(device);
  const Tensor used = torch::stable::new_empty(state, {});
  const ScalarType dtype = theta.empty() ? ScalarType::Float : theta[0].scalar_type();
  with_buffer_and_storage(buffer_dtype(dtype), dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto theta_data = data_of<P>(theta);
    const auto gradient_data = beside_written<P>(gradient);
    P* const* const lists[2] = {theta_data.data(), gradient_data.data()};
    const auto sizes = sizes_of(theta);
    const kernels::DescendArguments<T> arguments{read<double>(state),
                                                 factor ? read<double>(*factor) : nullptr,
                                                 gain,
                                                 max_lr,
                                                 weight_decay,
                                                 momentum,
                                                 buffer ? written<T>(*buffer) : nullptr,
                                                 written<double>(used)};
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      // Without any tensor there is one launch all the same: it writes the rate.
      kernels::for_each_table(lists, sizes.data(), offsets ? offsets->data() : nullptr,
                              static_cast<int64_t>(sizes.size()),
                              [&](const kernels::DirectionSegments<P>& table) {
                                launcher.run("descend_", kernels::descend<T, P, kind()>,
                                             blocks_for(launcher, chunks_of(table), 5),
                                             kernels::kThreads, table, arguments);
                              });
    });
  });
  return used;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("descend_", TORCH_BOX(&lyapcuda::cuda::descend_));
}
