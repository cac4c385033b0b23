// torch.ops.lyapcuda.descend_ on CUDA: kernels/descend.cuh.
#include "../kernels/descend.cuh"

#include <cmath>

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

Tensor descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient, Tensor state, double gain,
                double max_lr, double weight_decay) {
  const Device device = device_of(state, "state");
  check_vector(state, "state", kStateSize, device);
  check_like(gradient, "gradient", theta, "theta");
  STD_TORCH_CHECK(gain > 0.0 && std::isfinite(gain), "gain: expected a positive number, got ",
                  gain);
  STD_TORCH_CHECK(max_lr > 0.0 && std::isfinite(max_lr), "max_lr: expected a positive number, got ",
                  max_lr);
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
  }

  const Launcher launcher(device);
  const Tensor used = torch::stable::new_empty(state, {});
  const kernels::DescendArguments arguments{read<double>(state), gain, max_lr, weight_decay,
                                            written<double>(used)};
  const ScalarType dtype = theta.empty() ? ScalarType::Float : theta[0].scalar_type();
  const ScalarType buffer = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  with_buffer_and_storage(buffer, dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto theta_data = data_of<P>(theta);
    const auto gradient_data = beside_written<P>(gradient);
    P* const* const lists[2] = {theta_data.data(), gradient_data.data()};
    const auto sizes = sizes_of(theta);
    // Without any tensor there is one launch all the same: it writes the rate.
    kernels::for_each_table(lists, sizes.data(), nullptr, static_cast<int64_t>(sizes.size()),
                            [&](const kernels::DescendSegments<P>& table) {
                              launcher.run("descend_", kernels::descend<T, P>,
                                           blocks_for(launcher, chunks_of(table), 5),
                                           kernels::kThreads, table, arguments);
                            });
  });
  return used;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("descend_", TORCH_BOX(&lyapcuda::cuda::descend_));
}
