// torch.ops.lyapcuda.project_: takes the rows of a panel out of a vector, and multiplies what is
// left with them.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "project.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T>
void project_typed(const Tensor& w, const Tensor& v, const Tensor& coefficients, double* out) {
  const int64_t m = v.size(0), n = w.numel();
  const double* const values = static_cast<const double*>(coefficients.const_data_ptr());
  const std::vector<T> factors(values, values + m);
  T* const w_data = static_cast<T*>(w.mutable_data_ptr());
  const T* const v_data = static_cast<const T*>(v.const_data_ptr());
  const Blocks blocks({n}, kPanelBlock);
  std::vector<double> partial(blocks.runs() * (m + 1), 0.0);
  blocks.for_each_run(m + 1, [&](int64_t run, const auto& visit) {
    visit([&](int64_t, int64_t begin, int64_t length, int64_t) {
      LYAPCUDA_DISPATCH(project_block<T>)(w_data + begin, v_data + begin, n, factors.data(), m,
                                          length, partial.data() + run * (m + 1));
    });
  });
  tree_sum(partial.data(), blocks.runs(), m + 1);
  std::copy_n(partial.begin(), m + 1, out);
}

Tensor project_(Tensor w, Tensor v, Tensor coefficients) {
  check_buffer(w, "w");
  STD_TORCH_CHECK(v.scalar_type() == w.scalar_type(), "v: dtype ", dtype_name(v.scalar_type()),
                  " differs from w's ", dtype_name(w.scalar_type()));
  STD_TORCH_CHECK(v.is_cpu() && v.dim() == 2 && v.is_contiguous(),
                  "v: expected a contiguous 2-D CPU tensor, got ", v.dim(), " dimensions");
  STD_TORCH_CHECK(v.size(0) <= kMaxPanelRows, "v: ", v.size(0), " rows, expected at most ",
                  kMaxPanelRows);
  check_row_length(v, "v", w, "w");
  check_vector(coefficients, "coefficients", v.size(0));
  STD_TORCH_CHECK(!overlap(w, v), "w: shares memory with v");
  Tensor out = torch::stable::new_empty(coefficients, {v.size(0) + 1});
  double* const data = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(data, out.numel(), 0.0);
  if (w.numel() == 0) return out;
  w.scalar_type() == ScalarType::Double ? project_typed<double>(w, v, coefficients, data)
                                        : project_typed<float>(w, v, coefficients, data);
  return out;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("project_", TORCH_BOX(&lyapcuda::cpu::project_));
}
