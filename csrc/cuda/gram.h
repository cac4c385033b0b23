// Products of the rows of two panels on CUDA: kernels/gram.cuh. And the second stage of every Gram
// matrix.
#pragma once

#include "../kernels/gram.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

// `count` rows of partial sums to `out`; zeros where the gate, if there is one, is closed.
inline void finish_gram(const Launcher& launcher, const char* name, const double* partial,
                        int64_t count, const kernels::GramShape& shape, double* out,
                        const double* gate) {
  const int pairs = shape.symmetric ? kernels::symmetric_pairs(shape.rows)
                                    : kernels::rectangular_pairs(shape.rows, shape.columns);
  launcher.run(name, kernels::gram_finish, kernels::gram_finish_blocks(pairs), kernels::kThreads,
               partial, count, shape, out, gate);
}

template <class T, bool kSymmetric, bool kWeighted, int kRows>
void products_of(const Launcher& launcher, kernels::GramArguments<T> arguments, double* out) {
  constexpr int kLength = kernels::Tile<T, kRows>::kLength;
  const kernels::GramShape shape{arguments.rows, arguments.columns, kSymmetric};
  const int pairs = kSymmetric ? kernels::symmetric_pairs(shape.rows)
                               : kernels::rectangular_pairs(shape.rows, shape.columns);
  const int64_t blocks =
      blocks_for(launcher, ceil_div(arguments.n, kLength), kernels::gram_blocks(kRows, kWeighted));
  const Tensor partial = new_doubles(launcher.beside(), {blocks, kernels::gram_row(pairs)});
  arguments.partial = written<double>(partial);
  launcher.run("gram", kernels::gram<T, kSymmetric, kWeighted, kRows>, blocks,
               kernels::gram_threads(kRows), arguments);
  finish_gram(launcher, "gram", arguments.partial, blocks, shape, out, arguments.gate);
}

// a·bᵀ to out, of elements taken times weights where there are any; zeros where the gate, if there
// is one, is closed.
template <class T>
void products(const Launcher& launcher, const Tensor& a, const Tensor& b, const double* gate,
              const T* weights, double* out) {
  const int rows = static_cast<int>(a.size(0)), columns = static_cast<int>(b.size(0));
  const bool symmetric = is_itself(a, b);
  const kernels::GramArguments<T> arguments{read<T>(a), read<T>(b), a.size(1), rows,
                                            columns,    gate,       weights,   nullptr};
  with_flags(weights != nullptr, [&](auto weighted) {
    if (symmetric) {
      kernels::with_rows<8, 16, 32, 128>(rows, [&](auto most) {
        products_of<T, true, weighted(), most()>(launcher, arguments, out);
      });
    } else {
      kernels::with_rows<64, 256>(2 * std::max(rows, columns), [&](auto most) {
        products_of<T, false, weighted(), most()>(launcher, arguments, out);
      });
    }
  });
}

}  // namespace lyapcuda::cuda
