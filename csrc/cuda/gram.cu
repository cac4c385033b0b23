// torch.ops.lyapcuda.gram on CUDA: kernels/gram.cuh.
#include "gram.h"

#include "../kernels/gram.cuh"
#include "launch.h"

namespace lyapcuda::cuda {

void finish_gram(const Launcher& launcher, const char* name, const double* partial, int64_t count,
                 const kernels::GramShape& shape, double* out, const double* gate) {
  const int pairs = shape.symmetric ? kernels::symmetric_pairs(shape.rows)
                                    : kernels::rectangular_pairs(shape.rows, shape.columns);
  launcher.run(name, kernels::gram_finish, kernels::gram_finish_blocks(pairs), kernels::kThreads,
               partial, count, shape, out, gate);
}

namespace {

template <class T, bool kSymmetric, int kRows>
void gram_typed(const Launcher& launcher, kernels::GramArguments<T> arguments, const Tensor& like,
                double* out) {
  constexpr int kLength = kernels::Tile<T, kRows>::kLength;
  const kernels::GramShape shape{arguments.rows, arguments.columns, kSymmetric};
  const int pairs = kSymmetric ? kernels::symmetric_pairs(shape.rows)
                               : kernels::rectangular_pairs(shape.rows, shape.columns);
  const int64_t blocks =
      blocks_for(launcher, ceil_div(arguments.n, kLength), kernels::gram_blocks(kRows));
  const Tensor partial =
      torch::stable::new_empty(like, {blocks, kernels::gram_row(pairs)}, ScalarType::Double);
  arguments.partial = written<double>(partial);
  launcher.run("gram", kernels::gram<T, kSymmetric, kRows>, blocks, kernels::gram_threads(kRows),
               arguments);
  finish_gram(launcher, "gram", arguments.partial, blocks, shape, out, arguments.gate);
}

Tensor gram(Tensor a, Tensor b, std::optional<Tensor> gate) {
  const Device device = device_of(a, "a");
  check_panel(a, "a", kMaxPanelRows, device);
  check_panel(b, "b", kMaxPanelRows, device);
  check_row_length(b, "b", a, "a");
  check_gate(gate, device);

  const Launcher launcher(device);
  const Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(0)}, ScalarType::Double);
  const int rows = static_cast<int>(a.size(0)), columns = static_cast<int>(b.size(0));
  const bool symmetric = a.const_data_ptr() == b.const_data_ptr() && rows == columns;
  with_buffer_and_storage(a.scalar_type(), a.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    const kernels::GramArguments<T> arguments{
        read<T>(a), read<T>(b), a.size(1), rows, columns, gate ? read<double>(*gate) : nullptr,
        nullptr};
    double* const to = written<double>(out);
    if (symmetric) {
      kernels::with_rows<8, 16, 32, 128>(
          rows, [&](auto most) { gram_typed<T, true, most()>(launcher, arguments, a, to); });
    } else {
      kernels::with_rows<64, 256>(2 * std::max(rows, columns), [&](auto most) {
        gram_typed<T, false, most()>(launcher, arguments, a, to);
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("gram", TORCH_BOX(&lyapcuda::cuda::gram));
}
