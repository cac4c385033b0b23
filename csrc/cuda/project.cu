// torch.ops.lyapcuda.project_ on CUDA: kernels/project.cuh.
#include "../kernels/project.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

template <class T, int kRows>
void project_typed(const Launcher& launcher, kernels::ProjectArguments<T> arguments,
                   const Tensor& like, double* out) {
  const int64_t tiles = ceil_div(arguments.n, kernels::kProjectLength<T, kRows>);
  const int64_t blocks = blocks_for(launcher, tiles, kernels::project_blocks(kRows));
  const Tensor partial = torch::stable::new_empty(like, {blocks, int64_t{arguments.rows} + 1});
  arguments.partial = written<double>(partial);
  launcher.run("project_", kernels::project<T, kRows>, blocks, kernels::kThreads, arguments);
  const double* const to_add = arguments.partial;
  launcher.run("project_", kernels::project_finish, kernels::project_finish_blocks(arguments.rows),
               kernels::kThreads, to_add, blocks, arguments.rows, out);
}

Tensor project_(Tensor w, Tensor v, Tensor coefficients) {
  const Device device = device_of(w, "w");
  check_buffer(w, "w", device);
  STD_TORCH_CHECK(v.scalar_type() == w.scalar_type(), "v: dtype ", dtype_name(v.scalar_type()),
                  " differs from w's ", dtype_name(w.scalar_type()));
  STD_TORCH_CHECK(v.dim() == 2 && v.is_contiguous(), "v: expected a contiguous 2-D ",
                  tensor_on(device), ", got ", v.dim(), " dimensions");
  check_device(v, "v", device);
  STD_TORCH_CHECK(v.size(0) <= kMaxPanelRows, "v: ", v.size(0), " rows, expected at most ",
                  kMaxPanelRows);
  check_row_length(v, "v", w, "w");
  check_vector(coefficients, "coefficients", v.size(0), device);
  STD_TORCH_CHECK(!overlap(w, v), "w: shares memory with v");

  const Launcher launcher(device);
  const Tensor out = torch::stable::new_empty(coefficients, {v.size(0) + 1});
  const int rows = static_cast<int>(v.size(0));
  with_buffer_and_storage(w.scalar_type(), w.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    const kernels::ProjectArguments<T> arguments{
        written<T>(w), read<T>(v), w.numel(), rows, read<double>(coefficients), nullptr};
    kernels::with_rows<16, 32, 129>(rows + 1, [&](auto most) {
      project_typed<T, most()>(launcher, arguments, coefficients, written<double>(out));
    });
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("project_", TORCH_BOX(&lyapcuda::cuda::project_));
}
