// The 16-bit storage types: to float exactly, from float to the nearest, ties to even.
#pragma once

#include <cstdint>

#include "../simt/simt.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <cstring>
#endif

namespace lyapcuda::kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#ifdef __CUDACC__

__device__ __forceinline__ float widen(BFloat16 v) {
  return __uint_as_float(uint32_t{v.bits} << 16);
}
__device__ __forceinline__ float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ void narrow(float v, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ void narrow(float v, Half& to) {
  to.bits = __half_as_ushort(__float2half_rn(v));
}

#else

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(BFloat16 v) { return bits_as<float>(uint32_t{v.bits} << 16); }
inline float widen(Half v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | magnitude << 13);
  if (magnitude >= 0x0400u) return bits_as<float>(sign | ((magnitude << 13) + 0x38000000u));
  return (sign != 0 ? -0x1p-24f : 0x1p-24f) * static_cast<float>(magnitude);
}
inline void narrow(float v, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(v);
  to.bits = v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float v, Half& to) {
  const uint32_t bits = bits_as<uint32_t>(v), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7fffu;
  } else if (magnitude >= 0x47800000u) {
    out = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding 0.5, whose ulp is the half's subnormal step, lets the adder do the rounding.
    out = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | out);
}

#endif

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }

// The value that storing v as a P leaves behind.
template <class P, class T>
__device__ __forceinline__ T round_to(T v) {
  P stored;
  narrow(v, stored);
  return widen(stored);
}

}  // namespace lyapcuda::kernels
