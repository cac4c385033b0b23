// The scalar mathematics of a step on CUDA: kernels/benettin.cuh, one block.
#pragma once

#include "../kernels/benettin.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

inline void step(const Launcher& launcher, double* state, const double* gram, const double* losses,
                 int loss_count, int k, const BenettinOptions& options) {
  launcher.run("benettin_", kernels::benettin, 1, kernels::benettin_threads(k), state, gram, losses,
               loss_count, k, options);
}

inline void refine(const Launcher& launcher, double* state, const double* gram, int k) {
  launcher.run("benettin_refine_", kernels::benettin_refine, 1, kernels::benettin_threads(k), state,
               gram, k);
}

}  // namespace lyapcuda::cuda
