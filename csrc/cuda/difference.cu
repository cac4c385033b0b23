// torch.ops.lyapcuda.difference_ on CUDA: kernels/difference.cuh.
#include "../kernels/difference.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void difference_(Tensor out, std::vector<Tensor> plus, std::vector<Tensor> minus,
                 std::vector<int64_t> offsets, Tensor scale, double keep, double weight_decay,
                 std::optional<Tensor> v) {
  const Device device = device_of(out, "out");
  check_buffer(out, "out", device);
  check_segments(plus, "plus", offsets, out, device);
  check_segments(minus, "minus", offsets, out, device);
  check_like(minus, "minus", plus, "plus");
  check_vector(scale, "scale", 1, device);
  if (v) check_same_buffer(*v, "v", out, "out", device);
  STD_TORCH_CHECK(v.has_value() || weight_decay == 0.0, "weight_decay: ", weight_decay, " needs v");
  if (plus.empty()) return;

  const Launcher launcher(device);
  with_buffer_and_storage(
      out.scalar_type(), plus[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        const auto plus_data = data_of<const P>(plus), minus_data = data_of<const P>(minus);
        const P* const* const lists[2] = {plus_data.data(), minus_data.data()};
        const auto sizes = sizes_of(plus);
        const kernels::DifferenceArguments<T> arguments{written<T>(out), v ? read<T>(*v) : nullptr,
                                                        read<double>(scale), keep, weight_decay};
        kernels::for_each_table(lists, sizes.data(), offsets.data(),
                                static_cast<int64_t>(sizes.size()),
                                [&](const kernels::DifferenceSegments<P>& table) {
                                  launcher.run("difference_", kernels::difference<T, P>,
                                               blocks_for(launcher, chunks_of(table), 4),
                                               kernels::kThreads, table, arguments);
                                });
      });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("difference_", TORCH_BOX(&lyapcuda::cuda::difference_));
}
