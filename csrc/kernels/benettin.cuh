// From the Gram matrix of a panel's step to Ritz values, exponents, β and the transform, on the
// device.
//
//   benettin, benettin_refine   1 block of benettin_threads(k); its scratch is in shared memory
#pragma once

#include "../scalars/benettin.h"
#include "reduce.cuh"

namespace lyapcuda::kernels {

// A few rows are soonest done by one warp, whose barriers cost little.
__host__ __device__ constexpr int benettin_threads(int k) { return k <= 4 ? 32 : kThreads; }

struct BlockTeam {
  int rank = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  __device__ void sync() const { __syncthreads(); }
};

struct BenettinMemory {
  double scratch[benettin_scratch(static_cast<int>(kMaxK))];
};

static __global__ void __launch_bounds__(kThreads, 1)
    benettin(double* state, const double* gram, const double* losses, int loss_count, int k,
             const BenettinOptions options) {
  LYAPCUDA_SHARED(BenettinMemory, memory);
  if (blockIdx.x != 0) return;
  benettin_step(BlockTeam{}, state, gram, losses, loss_count, k, options, memory.scratch);
}

static __global__ void __launch_bounds__(kThreads, 1)
    benettin_refine(double* state, const double* gram, int k) {
  LYAPCUDA_SHARED(BenettinMemory, memory);
  if (blockIdx.x != 0) return;
  lyapcuda::benettin_refine(BlockTeam{}, state, gram, k, memory.scratch);
}

}  // namespace lyapcuda::kernels
