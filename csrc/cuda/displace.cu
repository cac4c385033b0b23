// torch.ops.lyapcuda.displace_ on CUDA: kernels/displace.cuh.
#include "../kernels/displace.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

Tensor displace_(std::vector<Tensor> copies, Tensor v, std::vector<Tensor> theta,
                 std::vector<int64_t> offsets, Tensor step) {
  const Device device = device_of(v, "v");
  check_buffer(v, "v", device);
  check_segments(theta, "theta", offsets, v, device);
  check_segments(copies, "copies", offsets, v, device);
  check_like(copies, "copies", theta, "theta");
  check_vector(step, "step", 1, device);

  constexpr int kHeld = 5;
  const Launcher launcher(device);
  const Tensor sums = torch::stable::new_empty(step, {int64_t{kernels::kDisplaceSums}});
  const Tensor rows = torch::stable::new_empty(
      step, {most_blocks(launcher, theta.size(), kHeld), int64_t{kernels::kDisplaceSums}});
  double* const first_row = written<double>(rows);
  int64_t count = 0;
  const ScalarType storage = theta.empty() ? v.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(v.scalar_type(), storage, [&](auto* buffer, auto* stored) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(stored)>;
    const auto copies_data = data_of<P>(copies);
    const auto theta_data = beside_written<P>(theta);
    P* const* const lists[2] = {copies_data.data(), theta_data.data()};
    const auto sizes = sizes_of(theta);
    kernels::for_each_table(lists, sizes.data(), offsets.data(), static_cast<int64_t>(sizes.size()),
                            [&](const kernels::DisplaceSegments<P>& table) {
                              const int64_t blocks = blocks_for(launcher, chunks_of(table), kHeld);
                              const kernels::DisplaceArguments<T> arguments{
                                  read<T>(v), read<double>(step),
                                  first_row + count * kernels::kDisplaceSums};
                              launcher.run("displace_", kernels::displace<T, P>, blocks,
                                           kernels::kThreads, table, arguments);
                              count += blocks;
                            });
  });
  const double* const to_add = first_row;
  launcher.run("displace_", kernels::displace_finish, 1, kernels::kThreads, to_add, count,
               written<double>(sums));
  return sums;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("displace_", TORCH_BOX(&lyapcuda::cuda::displace_));
}
