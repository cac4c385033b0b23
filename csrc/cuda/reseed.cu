// torch.ops.lyapcuda.reseed_ on CUDA: kernels/reseed.cuh.
#include "../kernels/reseed.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void reseed_(Tensor panel, std::vector<int64_t> offsets, std::vector<int64_t> sizes, Tensor state,
             int64_t elements, int64_t seed, std::optional<Tensor> p) {
  const Device device = device_of(panel, "panel");
  const int64_t k = reseed_rows(panel, p, state, offsets, sizes, elements, device);
  if (sizes.empty()) return;

  const Launcher launcher(device);
  with_buffer_and_storage(panel.scalar_type(), panel.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    const kernels::ReseedArguments<T> arguments{written<T>(panel),
                                                p ? written<T>(*p) : nullptr,
                                                panel.size(panel.dim() - 1),
                                                k,
                                                read<double>(state),
                                                elements,
                                                seed};
    const std::vector<const T*> unread(sizes.size(), arguments.panel);
    const T* const* const lists[1] = {unread.data()};
    kernels::for_each_table(lists, sizes.data(), offsets.data(), static_cast<int64_t>(sizes.size()),
                            [&](const kernels::ReseedSegments<T>& table) {
                              launcher.run("reseed_", kernels::reseed<T>,
                                           blocks_for(launcher, chunks_of(table), 4),
                                           kernels::kThreads, table, arguments);
                            });
  });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("reseed_", TORCH_BOX(&lyapcuda::cuda::reseed_));
}
