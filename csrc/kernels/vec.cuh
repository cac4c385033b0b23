// Loads, stores and products of the kernels' arithmetic type T from and to storage of type P.
#pragma once

#include "../scalars/host_device.h"
#include "half.cuh"

namespace lyapcuda::kernels {

// Elements a thread takes at a time: 16 bytes of the narrower type, so every access is of 16.
template <class P>
constexpr int kGroup = 16 / sizeof(P);

// A product that no compiler contracts with a sum. ascent has to find the displacement that
// recenter wrote, to the bit, and elements come out as on the CPU.
__device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#elif defined(LYAPCUDA_CONTRACT)
  volatile float rounded = a * b;
  return rounded;
#else
  return a * b;
#endif
}
__device__ __forceinline__ double product(double a, double b) { return mul(a, b); }

// sum += a·b in double; for T = float the product is exact, and a fused one gives the same bits.
__device__ __forceinline__ void accumulate(double& sum, float a, float b) {
  sum = fma(static_cast<double>(a), static_cast<double>(b), sum);
}
__device__ __forceinline__ void accumulate(double& sum, double a, double b) {
  sum += product(a, b);
}

__device__ __forceinline__ bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// What 16 bytes are read as.
template <class P>
struct Wide {
  using type = uint4;
};
template <>
struct Wide<float> {
  using type = float4;
};
template <>
struct Wide<double> {
  using type = double2;
};

template <class P>
union Sixteen {
  typename Wide<P>::type whole;
  P parts[kGroup<P>];
};

template <class P>
union Eight {
  uint2 whole;
  P parts[8 / sizeof(P)];
};

// N = 1, or N elements from an address divisible by 16.
template <int N, class T, class P>
__device__ __forceinline__ void load(T (&to)[N], const P* from) {
  if constexpr (N == 1) {
    to[0] = widen(*from);
  } else {
    static_assert(N % kGroup<P> == 0);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; k += kGroup<P>) {
      Sixteen<P> block;
      block.whole = *reinterpret_cast<const typename Wide<P>::type*>(from + k);
      LYAPCUDA_UNROLL
      for (int i = 0; i < kGroup<P>; ++i) to[k + i] = widen(block.parts[i]);
    }
  }
}

template <int N, class T, class P>
__device__ __forceinline__ void store(P* to, const T (&from)[N]) {
  if constexpr (N == 1) {
    narrow(from[0], *to);
  } else {
    static_assert(N % kGroup<P> == 0);
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; k += kGroup<P>) {
      Sixteen<P> block;
      LYAPCUDA_UNROLL
      for (int i = 0; i < kGroup<P>; ++i) narrow(from[k + i], block.parts[i]);
      // A plain assignment comes out as a store for every part.
      __stwb(reinterpret_cast<typename Wide<P>::type*>(to + k), block.whole);
    }
  }
}

// N = 1, or N elements from an address divisible by 16, or by 8 where they are 8 bytes.
template <int N, class T, class P>
__device__ __forceinline__ void load_part(T (&to)[N], const P* from) {
  if constexpr (N == 1 || N % kGroup<P> == 0) {
    load(to, from);
  } else {
    static_assert(N * sizeof(P) == sizeof(Eight<P>));
    Eight<P> block;
    block.whole = *reinterpret_cast<const uint2*>(from);
    LYAPCUDA_UNROLL
    for (int i = 0; i < N; ++i) to[i] = widen(block.parts[i]);
  }
}

template <int N, class T, class P>
__device__ __forceinline__ void store_part(P* to, const T (&from)[N]) {
  if constexpr (N == 1 || N % kGroup<P> == 0) {
    store(to, from);
  } else {
    static_assert(N * sizeof(P) == sizeof(Eight<P>));
    Eight<P> block;
    LYAPCUDA_UNROLL
    for (int i = 0; i < N; ++i) narrow(from[i], block.parts[i]);
    __stwb(reinterpret_cast<uint2*>(to), block.whole);
  }
}

}  // namespace lyapcuda::kernels
