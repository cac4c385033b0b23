// torch.ops.lyapcuda.recenter_ on CUDA: kernels/recenter.cuh.
#include "../kernels/recenter.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void recenter_(std::vector<Tensor> theta1, Tensor q, Tensor q_previous, std::vector<Tensor> theta,
               std::vector<int64_t> offsets, Tensor state, std::optional<Tensor> p,
               std::optional<Tensor> p_previous) {
  const Device device = device_of(q, "q");
  check_buffer(q, "q", device);
  check_same_buffer(q_previous, "q_previous", q, "q", device);
  check_segments(theta, "theta", offsets, q, device);
  check_segments(theta1, "theta1", offsets, q, device);
  check_like(theta1, "theta1", theta, "theta");
  check_vector(state, "state", kStateSize, device);
  check_both(p, "p", p_previous, "p_previous");
  if (p) {
    check_same_buffer(*p, "p", q, "q", device);
    check_same_buffer(*p_previous, "p_previous", q, "q", device);
  }
  if (theta.empty()) return;

  const Launcher launcher(device);
  with_buffer_and_storage(
      q.scalar_type(), theta[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        const auto theta1_data = data_of<P>(theta1);
        const auto theta_data = beside_written<P>(theta);
        P* const* const lists[2] = {theta1_data.data(), theta_data.data()};
        const auto sizes = sizes_of(theta);
        const kernels::RecenterArguments<T> arguments{
            written<T>(q), read<T>(q_previous), p ? written<T>(*p) : nullptr,
            p ? read<T>(*p_previous) : nullptr, read<double>(state)};
        kernels::for_each_table(lists, sizes.data(), offsets.data(),
                                static_cast<int64_t>(sizes.size()),
                                [&](const kernels::RecenterSegments<P>& table) {
                                  launcher.run("recenter_", kernels::recenter<T, P>,
                                               blocks_for(launcher, chunks_of(table), 5),
                                               kernels::kThreads, table, arguments);
                                });
      });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("recenter_", TORCH_BOX(&lyapcuda::cuda::recenter_));
}
