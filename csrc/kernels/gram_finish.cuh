// The rows of partial sums that blocks left to the Gram matrix (panel_gram.cuh). A file of its own:
// two ops end with it.
#pragma once

#include "panel_gram.cuh"

namespace lyapcuda::kernels {

static __global__ void __launch_bounds__(kThreads, 4)
    gram_finish(const double* partial, int64_t count, const GramShape shape, double* out,
                const double* gate) {
  const int pair = blockIdx.x / (kPairSums / 32), value = blockIdx.x % (kPairSums / 32);
  const int lane = threadIdx.x % 32;
  const int pairs =
      shape.symmetric ? symmetric_pairs(shape.rows) : rectangular_pairs(shape.rows, shape.columns);
  int row = 0, column = 0;
  if (shape.symmetric) {
    while ((column + 1) * (column + 2) / 2 <= pair) ++column;
    row = pair - column * (column + 1) / 2;
  } else {
    row = pair / supers_of(shape.columns);
    column = pair % supers_of(shape.columns);
  }
  const int i = row * kSuper + value / 8 * 8 + lane / 4;
  const int j = column * kSuper + value / 2 % 4 * 8 + lane % 4 * 2 + value % 2;
  const bool wanted = i < shape.rows && j < shape.columns && (!shape.symmetric || i <= j);
  const bool open = is_open(gate);
  const double sum = sum_column(partial, open ? count : 0, gram_row(pairs),
                                int64_t{blockIdx.x} * 32 + lane, wanted);
  if (threadIdx.x >= 32 || !wanted) return;
  out[i * shape.columns + j] = sum;
  if (shape.symmetric) out[j * shape.columns + i] = sum;
}

}  // namespace lyapcuda::kernels
