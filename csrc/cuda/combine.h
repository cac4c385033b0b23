// Combinations of a panel's rows on CUDA: kernels/combine.cuh.
#pragma once

#include "../kernels/combine.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

// out_j = Σ_i panel_i·T(matrix[i][j]), where the gate, if there is one, is open.
template <class T>
void combine(const Launcher& launcher, const Tensor& out, const Tensor& panel, const double* matrix,
             const double* gate) {
  const int rows = static_cast<int>(panel.size(0)), columns = static_cast<int>(out.size(0));
  const kernels::CombineArguments<T> arguments{written<T>(out), read<T>(panel), panel.size(1), rows,
                                               columns,         matrix,         gate};
  kernels::with_rows<8, 16, 32, 128>(std::max(rows, columns), [&](auto most) {
    const int64_t tiles = ceil_div(arguments.n, kernels::kTransformLength<T, most()>);
    launcher.run("combine_", kernels::combine<T, most()>, blocks_for(launcher, tiles, 4),
                 kernels::kThreads, arguments);
  });
}

}  // namespace lyapcuda::cuda
