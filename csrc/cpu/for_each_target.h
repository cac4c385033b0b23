// Compiles LYAPCUDA_SOURCE's arithmetic once for every instruction set, each in a namespace of its
// own, so that one binary runs anywhere and picks the widest at load. The arithmetic includes no
// standard headers: a library inline function compiled here for AVX could be the copy that a plain
// function links to. LYAPCUDA_DISPATCH(function) points to the chosen one.
#include "targets.h"

#define LYAPCUDA_ELEMENT
namespace lyapcuda::cpu::baseline {
#include "simd.inc"

#include "../elements/ascent.h"
#include "../elements/direction.h"
#include "../elements/rows.h"
#include "elementwise.inc"

#include LYAPCUDA_SOURCE
}  // namespace lyapcuda::cpu::baseline

#if defined(__x86_64__)

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LYAPCUDA_AVX2  // __AVX2__ doesn't follow the pragma in g++
namespace lyapcuda::cpu::avx2 {
#include "simd.inc"

#include "../elements/ascent.h"
#include "../elements/direction.h"
#include "../elements/rows.h"
#include "elementwise.inc"

#include LYAPCUDA_SOURCE
}  // namespace lyapcuda::cpu::avx2
#undef LYAPCUDA_AVX2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define LYAPCUDA_DISPATCH(...)                                 \
  (::lyapcuda::cpu::target() == ::lyapcuda::cpu::Target::kAvx2 \
       ? &::lyapcuda::cpu::avx2::__VA_ARGS__                   \
       : &::lyapcuda::cpu::baseline::__VA_ARGS__)
// function<type>, both of the instruction set.
#define LYAPCUDA_DISPATCH_OF(function, ...)                                   \
  (::lyapcuda::cpu::target() == ::lyapcuda::cpu::Target::kAvx2                \
       ? &::lyapcuda::cpu::avx2::function<::lyapcuda::cpu::avx2::__VA_ARGS__> \
       : &::lyapcuda::cpu::baseline::function<::lyapcuda::cpu::baseline::__VA_ARGS__>)

#else

#define LYAPCUDA_DISPATCH(...) (&::lyapcuda::cpu::baseline::__VA_ARGS__)
#define LYAPCUDA_DISPATCH_OF(function, ...) \
  (&::lyapcuda::cpu::baseline::function<::lyapcuda::cpu::baseline::__VA_ARGS__>)

#endif
#undef LYAPCUDA_ELEMENT
