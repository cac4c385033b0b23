// Rows of partial sums to the rows + 1 sums they are of: what project and slopes end with.
//
//   project_finish      project_finish_blocks(rows) of kThreads
//
// static: two sources launch it, and a kernel that is no template may be defined in one alone.
#pragma once

#include "panel.cuh"

namespace lyapcuda::kernels {

__host__ __device__ constexpr int project_finish_blocks(int rows) { return rows / 32 + 1; }

static __global__ void __launch_bounds__(kThreads, 4)
    project_finish(const double* partial, int64_t count, int rows, double* out) {
  const int column = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
  const double sum = sum_column(partial, count, rows + 1, column, column <= rows);
  if (threadIdx.x < 32 && column <= rows) out[column] = sum;
}

}  // namespace lyapcuda::kernels
