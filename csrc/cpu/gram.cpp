// torch.ops.lyapcuda.gram: all products of the rows of two panels.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "gram.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T>
void gram_typed(const Tensor& a, const Tensor& b, double* out) {
  const GramArguments<T> arguments{
      static_cast<const T*>(a.const_data_ptr()),
      static_cast<const T*>(b.const_data_ptr()),
      a.size(0),
      b.size(0),
      a.size(1),
      a.const_data_ptr() == b.const_data_ptr() && a.size(0) == b.size(0)};
  const int64_t rows = arguments.rows_a, columns = arguments.rows_b;
  const Blocks blocks({a.size(1)}, kPanelBlock);
  std::vector<double> partial(blocks.runs() * rows * columns, 0.0);
  blocks.for_each_run(rows + columns, [&](int64_t run, const auto& visit) {
    Aligned<double> tile((rows + columns) * kGramTile);
    double* const sums = partial.data() + run * rows * columns;
    visit([&](int64_t, int64_t begin, int64_t length, int64_t) {
      LYAPCUDA_DISPATCH(gram_block<T>)(arguments, begin, length, tile.data(), sums);
    });
  });
  tree_sum(partial.data(), blocks.runs(), rows * columns);
  if (arguments.same) mirror(partial.data(), rows);
  std::copy_n(partial.begin(), rows * columns, out);
}

Tensor gram(Tensor a, Tensor b, std::optional<Tensor> gate) {
  check_panel(a, "a", kMaxPanelRows);
  check_panel(b, "b", kMaxPanelRows);
  check_row_length(b, "b", a, "a");
  check_gate(gate);
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(0)}, ScalarType::Double);
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(data, out.numel(), 0.0);
  if (a.size(1) == 0 || !is_open(gate)) return out;
  a.scalar_type() == ScalarType::Double ? gram_typed<double>(a, b, data)
                                        : gram_typed<float>(a, b, data);
  return out;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) { m.impl("gram", TORCH_BOX(&lyapcuda::cpu::gram)); }
