// A vector without its part along the rows of a panel, on CUDA: kernels/project.cuh.
#pragma once

#include "../kernels/project.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

template <class T>
void project(const Launcher& launcher, const Tensor& w, const Tensor& v, const double* coefficients,
             double* out) {
  const int rows = static_cast<int>(v.size(0));
  kernels::ProjectArguments<T> arguments{written<T>(w), read<T>(v),   w.numel(),
                                         rows,          coefficients, nullptr};
  kernels::with_rows<16, 32, 129>(rows + 1, [&](auto most) {
    const int64_t tiles = ceil_div(arguments.n, kernels::kProjectLength<T, most()>);
    const int64_t blocks = blocks_for(launcher, tiles, kernels::project_blocks(most()));
    const Tensor partial = new_doubles(launcher.beside(), {blocks, rows + 1});
    arguments.partial = written<double>(partial);
    launcher.run("project_", kernels::project<T, most()>, blocks, kernels::kThreads, arguments);
    const double* const to_add = arguments.partial;
    launcher.run("project_", kernels::project_finish, kernels::project_finish_blocks(rows),
                 kernels::kThreads, to_add, blocks, rows, out);
  });
}

}  // namespace lyapcuda::cuda
