// The yardstick of bench/: a copy as fast as the device allows.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace lyapcuda::kernels {

constexpr int kCopiesInFlight = 4;  // 16-byte loads a thread issues before its first store

// n is in words of 4 bytes; the two don't overlap.
__global__ void __launch_bounds__(kThreads, 8)
    stream_copy(float* __restrict__ to, const float* __restrict__ from, int64_t n) {
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t vectors = aligned16(to) && aligned16(from) ? n / 4 : 0;
  const float4* const source = reinterpret_cast<const float4*>(from);
  float4* const target = reinterpret_cast<float4*>(to);
  int64_t i = thread;
  for (; i + (kCopiesInFlight - 1) * threads < vectors; i += kCopiesInFlight * threads) {
    float4 held[kCopiesInFlight];
    LYAPCUDA_UNROLL
    for (int k = 0; k < kCopiesInFlight; ++k) held[k] = source[i + k * threads];
    LYAPCUDA_UNROLL
    for (int k = 0; k < kCopiesInFlight; ++k) target[i + k * threads] = held[k];
  }
  for (; i < vectors; i += threads) target[i] = source[i];
  for (int64_t k = vectors * 4 + thread; k < n; k += threads) to[k] = from[k];
}

}  // namespace lyapcuda::kernels
