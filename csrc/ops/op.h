// What the source of an op includes. Each is compiled once for the CPU, and once for CUDA: by nvcc,
// or by g++ against the emulator of csrc/simt (LYAPCUDA_SIMT), into a library for the tests,
// torch.ops.lyapcuda_simt, whose "device" is the CPU.
//
// A source has two parts. The first, its arithmetic, is compiled once an instruction set of the
// CPU, and once for CUDA, in namespaces of their own; LYAPCUDA_ELEMENT is defined there. It is
// written in values that are eight lanes on the CPU (cpu/simd.inc), and one or several elements of
// a thread on CUDA (kernels/pack.cuh). The second part has the schema, the checks and the outputs.
#pragma once

#if defined(__CUDACC__) || defined(LYAPCUDA_SIMT)
#define LYAPCUDA_ON_CUDA
#define LYAPCUDA_BACKEND cuda
#include "../cuda/backend.h"
#else
#define LYAPCUDA_BACKEND cpu
#include "../cpu/backend.h"
#endif

#include "checks.h"
#include "lists.h"

#if defined(LYAPCUDA_SIMT)
#define LYAPCUDA_LIBRARY lyapcuda_simt
#else
#define LYAPCUDA_LIBRARY lyapcuda
#endif

// Registers an op of this backend; the schema once, with the CPU's or the emulator's.
#ifdef __CUDACC__
#define LYAPCUDA_OP(name, schema)                                \
  STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, CUDA, m) {         \
    m.impl(#name, TORCH_BOX(&lyapcuda::LYAPCUDA_BACKEND::name)); \
  }
#else
#define LYAPCUDA_OP(name, schema)                                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(LYAPCUDA_LIBRARY, m) { m.def(#name schema); } \
  STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, CPU, m) {                       \
    m.impl(#name, TORCH_BOX(&lyapcuda::LYAPCUDA_BACKEND::name));              \
  }
#endif

namespace lyapcuda {

// Calls f with std::bool_constants.
template <class F>
void with_flags(bool a, const F& f) {
  a ? f(std::true_type{}) : f(std::false_type{});
}
template <class F>
void with_flags(bool a, bool b, const F& f) {
  with_flags(a, [&](auto first) { with_flags(b, [&](auto second) { f(first, second); }); });
}
// Of two that exclude each other.
template <class F>
void with_one_flag(bool a, bool b, const F& f) {
  if (a) return f(std::true_type{}, std::false_type{});
  with_flags(b, [&](auto second) { f(std::false_type{}, second); });
}

}  // namespace lyapcuda
