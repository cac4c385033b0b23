// A vector without its part along the rows of a panel, on the CPU.
#pragma once

namespace lyapcuda::cpu {

template <class T>
void project(const Launcher&, const Tensor& w, const Tensor& v, const double* coefficients,
             double* out) {
  const int64_t m = v.size(0), n = w.numel();
  std::fill_n(out, m + 1, 0.0);
  if (n == 0) return;
  const std::vector<T> factors(coefficients, coefficients + m);
  T* const w_data = written<T>(w);
  const T* const v_data = read<T>(v);
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

}  // namespace lyapcuda::cpu
