// Combinations of a panel's rows on the CPU.
#pragma once

namespace lyapcuda::cpu {

// out_j = Σ_i panel_i·T(matrix[i][j]), where the gate, if there is one, is open.
template <class T>
void combine(const Launcher&, const Tensor& out, const Tensor& panel, const double* matrix,
             const double* gate) {
  if (gate != nullptr && *gate == 0.0) return;
  const int64_t rows = panel.size(0), columns = out.size(0);
  const std::vector<T> coefficients(matrix, matrix + rows * columns);
  const CombineArguments<T> all{written<T>(out), read<T>(panel), coefficients.data(), rows,
                                columns,         out.size(1)};
  const Blocks blocks({out.size(1)}, kPanelBlock);
  blocks.for_each_run(rows + columns, [&](int64_t, const auto& visit) {
    Aligned<T> tile(rows * combine_tile(rows));
    visit([&](int64_t, int64_t begin, int64_t length, int64_t) {
      CombineArguments<T> here = all;
      here.out += begin;
      here.panel += begin;
      LYAPCUDA_DISPATCH(combine_all<T>)(here, length, tile.data());
    });
  });
}

}  // namespace lyapcuda::cpu
