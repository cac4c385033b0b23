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

template <class T, kernels::GramSide kSide>
void gram_typed(const Launcher& launcher, kernels::GramArguments<T> arguments, const Tensor& like,
                double* out) {
  constexpr bool kSymmetric =
      kSide == kernels::GramSide::kSmallSymmetric || kSide == kernels::GramSide::kLargeSymmetric;
  constexpr int kLength = kernels::Tile<T, kernels::kGramRows<kSide>>::kLength;
  const kernels::GramShape shape{arguments.rows, arguments.columns, kSymmetric};
  const int pairs = kSymmetric ? kernels::symmetric_pairs(shape.rows)
                               : kernels::rectangular_pairs(shape.rows, shape.columns);
  const int64_t blocks =
      blocks_for(launcher, ceil_div(arguments.n, kLength), kernels::kGramBlocks<kSide>);
  const Tensor partial =
      torch::stable::new_empty(like, {blocks, kernels::gram_row(pairs)}, ScalarType::Double);
  arguments.partial = written<double>(partial);
  launcher.run("gram", kernels::gram<T, kSide>, blocks, kernels::kGramThreads<kSide>, arguments);
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
    using kernels::GramSide;
    const kernels::GramArguments<T> arguments{
        read<T>(a), read<T>(b), a.size(1), rows, columns, gate ? read<double>(*gate) : nullptr,
        nullptr};
    double* const to = written<double>(out);
    switch (kernels::gram_side(symmetric, rows, columns)) {
      case GramSide::kSmallSymmetric:
        return gram_typed<T, GramSide::kSmallSymmetric>(launcher, arguments, a, to);
      case GramSide::kLargeSymmetric:
        return gram_typed<T, GramSide::kLargeSymmetric>(launcher, arguments, a, to);
      case GramSide::kSmall:
        return gram_typed<T, GramSide::kSmall>(launcher, arguments, a, to);
      case GramSide::kLarge:
        return gram_typed<T, GramSide::kLarge>(launcher, arguments, a, to);
    }
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("gram", TORCH_BOX(&lyapcuda::cuda::gram));
}
