// Sums in double over a block, in an order that the number of threads alone fixes.
#pragma once

#include "../simt/simt.h"

namespace lyapcuda::kernels {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;

// Brings the sums of all threads to thread 0; other threads' are left undefined. Once a kernel: the
// shared memory is not protected against a second call.
template <int N>
__device__ __forceinline__ void block_sum(double (&sums)[N]) {
  struct Rows {
    double of[kWarps][N];
  };
  LYAPCUDA_SHARED(Rows, rows);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) {
    LYAPCUDA_UNROLL
    for (unsigned delta = 16; delta > 0; delta /= 2) {
      sums[k] += __shfl_down_sync(0xffffffffu, sums[k], delta);
    }
    if (lane == 0) rows.of[warp][k] = sums[k];
  }
  __syncthreads();
  if (warp != 0) return;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) {
    sums[k] = lane < kWarps ? rows.of[lane][k] : 0.0;
    LYAPCUDA_UNROLL
    for (unsigned delta = kWarps / 2; delta > 0; delta /= 2) {
      sums[k] += __shfl_down_sync(0xffffffffu, sums[k], delta);
    }
  }
}

// The second stage, for one block: thread t adds rows t, t + kThreads, ...; then as above.
template <int N>
__device__ __forceinline__ void sum_rows(double (&sums)[N], const double* rows, int64_t count) {
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) sums[k] = 0.0;
  for (int64_t row = threadIdx.x; row < count; row += kThreads) {
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; ++k) sums[k] += rows[row * N + k];
  }
  block_sum(sums);
}

}  // namespace lyapcuda::kernels
