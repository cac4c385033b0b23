// torch.ops.lyapcuda.combine_ on CUDA: kernels/combine.cuh.
#include "../kernels/combine.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

template <class T, int kRows>
void combine_typed(const Launcher& launcher, const kernels::CombineArguments<T>& arguments) {
  const int64_t tiles = ceil_div(arguments.n, kernels::kTransformLength<T, kRows>);
  launcher.run("combine_", kernels::combine<T, kRows>, blocks_for(launcher, tiles, 4),
               kernels::kThreads, arguments);
}

void combine_(Tensor out, Tensor panel, Tensor matrix, std::optional<Tensor> gate) {
  const Device device = device_of(panel, "panel");
  check_panel(panel, "panel", kMaxPanelRows, device);
  check_panel(out, "out", kMaxPanelRows, device);
  check_row_length(out, "out", panel, "panel");
  check_matrix(matrix, "matrix", panel.size(0), out.size(0), device);
  check_gate(gate, device);
  STD_TORCH_CHECK(!overlap(out, panel) || (out.const_data_ptr() == panel.const_data_ptr() &&
                                           out.size(0) <= panel.size(0)),
                  "out: shares memory with panel, but only from its first row on, and with no more "
                  "rows, may it do so (",
                  out.size(0), " rows, panel has ", panel.size(0), ")");
  if (out.size(1) == 0) return;

  const Launcher launcher(device);
  const int rows = static_cast<int>(panel.size(0)), columns = static_cast<int>(out.size(0));
  with_buffer_and_storage(panel.scalar_type(), panel.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    const kernels::CombineArguments<T> arguments{written<T>(out),
                                                 read<T>(panel),
                                                 panel.size(1),
                                                 rows,
                                                 columns,
                                                 read<double>(matrix),
                                                 gate ? read<double>(*gate) : nullptr};
    kernels::with_rows<8, 16, 32, 128>(
        std::max(rows, columns), [&](auto most) { combine_typed<T, most()>(launcher, arguments); });
  });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("combine_", TORCH_BOX(&lyapcuda::cuda::combine_));
}
