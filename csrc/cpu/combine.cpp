// torch.ops.lyapcuda.combine_: combinations of the rows of a panel.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "combine.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T>
void combine_typed(const Tensor& out, const Tensor& panel, const Tensor& matrix) {
  const double* const values = static_cast<const double*>(matrix.const_data_ptr());
  const std::vector<T> coefficients(values, values + matrix.numel());
  const CombineArguments<T> arguments{static_cast<T*>(out.mutable_data_ptr()),
                                      static_cast<const T*>(panel.const_data_ptr()),
                                      coefficients.data(),
                                      panel.size(0),
                                      out.size(0),
                                      out.size(1)};
  const Blocks blocks({out.size(1)}, kPanelBlock);
  blocks.for_each_run(arguments.rows_in + arguments.rows_out, [&](int64_t, const auto& visit) {
    Aligned<T> tile(arguments.rows_in * combine_tile(arguments.rows_in));
    visit([&](int64_t, int64_t begin, int64_t length, int64_t) {
      CombineArguments<T> here = arguments;
      here.out += begin;
      here.panel += begin;
      LYAPCUDA_DISPATCH(combine_all<T>)(here, length, tile.data());
    });
  });
}

void combine_(Tensor out, Tensor panel, Tensor matrix, std::optional<Tensor> gate) {
  check_panel(panel, "panel", kMaxPanelRows);
  check_panel(out, "out", kMaxPanelRows);
  check_row_length(out, "out", panel, "panel");
  check_matrix(matrix, "matrix", panel.size(0), out.size(0));
  check_gate(gate);
  STD_TORCH_CHECK(!overlap(out, panel) || (out.const_data_ptr() == panel.const_data_ptr() &&
                                           out.size(0) <= panel.size(0)),
                  "out: shares memory with panel, but only from its first row on, and with no more "
                  "rows, may it do so (",
                  out.size(0), " rows, panel has ", panel.size(0), ")");
  if (out.size(1) == 0 || !is_open(gate)) return;
  out.scalar_type() == ScalarType::Double ? combine_typed<double>(out, panel, matrix)
                                          : combine_typed<float>(out, panel, matrix);
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("combine_", TORCH_BOX(&lyapcuda::cpu::combine_));
}
