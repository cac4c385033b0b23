// Products of the rows of two panels on the CPU.
#pragma once

namespace lyapcuda::cpu {

// a·bᵀ to out, of elements taken times weights where there are any; zeros where the gate, if there
// is one, is closed.
template <class T>
void products(const Launcher&, const Tensor& a, const Tensor& b, const double* gate,
              const T* weights, double* out) {
  const int64_t rows = a.size(0), columns = b.size(0), length = a.size(1);
  std::fill_n(out, rows * columns, 0.0);
  if (length == 0 || (gate != nullptr && *gate == 0.0)) return;
  const GramArguments<T> arguments{read<T>(a), read<T>(b),      rows,   columns,
                                   length,     is_itself(a, b), weights};
  const Blocks blocks({length}, kPanelBlock);
  std::vector<double> partial(blocks.runs() * rows * columns, 0.0);
  blocks.for_each_run(rows + columns, [&](int64_t run, const auto& visit) {
    Aligned<double> tile((rows + columns) * kGramTile);
    double* const sums = partial.data() + run * rows * columns;
    visit([&](int64_t, int64_t begin, int64_t n, int64_t) {
      LYAPCUDA_DISPATCH(gram_block<T>)(arguments, begin, n, tile.data(), sums);
    });
  });
  tree_sum(partial.data(), blocks.runs(), rows * columns);
  if (arguments.same) mirror(partial.data(), rows);
  std::copy_n(partial.begin(), rows * columns, out);
}

}  // namespace lyapcuda::cpu
