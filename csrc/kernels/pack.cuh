// Values of the arithmetic in csrc/elements and csrc/ops: N elements of one thread. The CPU's are
// its lanes (cpu/simd.inc), with the same operators.
#pragma once

#include "../scalars/newton.h"
#include "vec.cuh"

#define LYAPCUDA_INLINE __device__ __forceinline__

namespace lyapcuda::kernels {

template <class T, int N>
struct Pack {
  T of[N];
};

template <class T, int N>
LYAPCUDA_INLINE Pack<T, N> operator+(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = a.of[k] + b.of[k];
  return out;
}
template <class T, int N>
LYAPCUDA_INLINE Pack<T, N> operator-(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = a.of[k] - b.of[k];
  return out;
}
// Products are rounded: never contracted with a sum.
template <class T, int N>
LYAPCUDA_INLINE Pack<T, N> operator*(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = product(a.of[k], b.of[k]);
  return out;
}
template <class T, int N>
LYAPCUDA_INLINE Pack<T, N> operator*(const Pack<T, N>& a, T b) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = product(a.of[k], b);
  return out;
}

// a/b, and 0 where b is 0.
template <class T, int N>
LYAPCUDA_INLINE Pack<T, N> quotient_or_zero(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = b.of[k] == T(0) ? T(0) : a.of[k] / b.of[k];
  return out;
}

// The values that storing them as P leaves behind.
template <class P, class T, int N>
LYAPCUDA_INLINE Pack<T, N> round_to(const Pack<T, N>& v) {
  Pack<T, N> out;
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) out.of[k] = round_to<P>(v.of[k]);
  return out;
}

// What a thread adds products up in, and its value.
using Accumulator = double;
LYAPCUDA_INLINE double total(Accumulator sum) { return sum; }

// sum += Σ a·b.
template <class T, int N>
LYAPCUDA_INLINE void accumulate(Accumulator& sum, const Pack<T, N>& a, const Pack<T, N>& b) {
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; ++k) accumulate(sum, a.of[k], b.of[k]);
}

#include "../elements/ascent.h"
#include "../elements/direction.h"
#include "../elements/rows.h"

}  // namespace lyapcuda::kernels
