// From the Gram matrix of a panel's step to Ritz values, exponents, β and the transform, on the
// device.
//
//   benettin, benettin_refine   1 block of kThreads each; a block's scratch is in shared memory
#pragma once

#include "../benettin.h"
#include "reduce.cuh"

namespace lyapcuda::kernels {

struct BlockTeam {
  int rank = static_cast<int>(threadIdx.x), size = kThreads;
  __device__ void sync() const { __syncthreads(); }
};

struct BenettinMemory {
  double scratch[benettin_scratch(static_cast<int>(kMaxPanel))];
};

__global__ void __launch_bounds__(kThreads, 1)
    benettin(double* state, const double* gram, const double* losses, int loss_count, int k,
             const BenettinOptions options) {
  LYAPCUDA_SHARED(BenettinMemory, memory);
  if (blockIdx.x != 0) return;
  benettin_step(BlockTeam{}, state, gram, losses, loss_count, k, options, memory.scratch);
}

__global__ void __launch_bounds__(kThreads, 1)
    benettin_refine(double* state, const double* gram, int k) {
  LYAPCUDA_SHARED(BenettinMemory, memory);
  if (blockIdx.x != 0) return;
  lyapcuda::benettin_refine(BlockTeam{}, state, gram, k, memory.scratch);
}

}  // namespace lyapcuda::kernels
