// torch.ops.lyapcuda.panel_recenter_ on CUDA: kernels/panel_recenter.cuh.
#include "../kernels/panel_recenter.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

template <class T, class P, int kRows>
void panel_recenter_typed(const Launcher& launcher, const std::vector<Tensor>& theta,
                          const std::vector<int64_t>& offsets,
                          const kernels::PanelRecenterArguments<T, P>& arguments) {
  const auto theta_data = data_of<const P>(theta);
  const P* const* const lists[1] = {theta_data.data()};
  const auto sizes = sizes_of(theta);
  constexpr int kHeld = sizeof(T) == sizeof(P) ? 4 : 3;
  kernels::for_each_table(
      lists, sizes.data(), offsets.data(), static_cast<int64_t>(sizes.size()),
      [&](const kernels::PanelRecenterSegments<P>& table) {
        launcher.run("panel_recenter_", kernels::panel_recenter<T, P, kRows>,
                     blocks_for(launcher, chunks_of(table), kHeld), kernels::kThreads, table,
                     arguments);
      },
      kernels::kTransformLength<T, kRows>);
}

void panel_recenter_(Tensor q, Tensor copies, Tensor d, std::vector<Tensor> theta,
                     std::vector<int64_t> offsets, Tensor state) {
  const Device device = device_of(q, "q");
  check_panel(q, "q", kMaxPanel, device);
  check_same_panel(d, "d", q, "q", device);
  check_segments(theta, "theta", offsets, q, device);
  check_storage_panel(copies, "copies", q, "q", theta, "theta", device);
  check_vector(state, "state", panel_size(q.size(0)), device);
  STD_TORCH_CHECK(!overlap(q, d), "q: shares memory with d");
  STD_TORCH_CHECK(!overlap(q, copies), "q: shares memory with copies");
  check_over(copies, "copies", d, "d");
  if (theta.empty()) return;

  const Launcher launcher(device);
  const int64_t k = q.size(0);
  const double* const values = read<double>(state);
  with_buffer_and_storage(
      q.scalar_type(), theta[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        const kernels::PanelRecenterArguments<T, P> arguments{
            written<T>(q),
            written<P>(copies),
            read<T>(d),
            q.size(1),
            static_cast<int>(k),
            values + panel_offset(PanelMatrix::transform, k),
            values + panel_offset(PanelScalar::pending)};
        kernels::with_rows<8, 16, 32>(k, [&](auto most) {
          panel_recenter_typed<T, P, most()>(launcher, theta, offsets, arguments);
        });
      });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("panel_recenter_", TORCH_BOX(&lyapcuda::cuda::panel_recenter_));
}
