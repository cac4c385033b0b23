// The CUDA words that csrc/kernels uses, for g++: the threads of a block are fibers of one thread,
// so the same kernel text runs, and is tested under sanitizers, without a GPU. Under nvcc this file
// only keeps the spellings that differ.
//
// One dimension, full warps. It sees wrong results, overruns (with ASan or guard bytes), barriers
// that not all threads reach, shuffles that not all lanes reach, and asynchronous copies that
// nobody waits for; a race shows up in one of the orders of warps, so run all. UBSan sees
// misaligned accesses. It is blind to the memory model within a warp and between blocks, and to
// speed.
#pragma once

namespace simt {
// Lets an array type stand before the name: LYAPCUDA_SHARED(double[8], rows).
template <class T>
using Same = T;
}  // namespace simt

#ifdef __CUDACC__

#include <cuda_pipeline_primitives.h>

// __shared__ with one difference: the emulator fills it with NaN at the start of a block.
#define LYAPCUDA_SHARED(type, name) __shared__ simt::Same<type> name
#define LYAPCUDA_UNROLL _Pragma("unroll")
#define LYAPCUDA_ROLLED _Pragma("unroll 1")
#define LYAPCUDA_PRAGMA(text) _Pragma(#text)
#define LYAPCUDA_UNROLL_BY(times) LYAPCUDA_PRAGMA(unroll times)

#else

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__ inline  // nvcc allows no such word beside __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define LYAPCUDA_UNROLL
#define LYAPCUDA_ROLLED
#define LYAPCUDA_UNROLL_BY(times)

struct Simt1 {
  unsigned x;
};
inline Simt1 threadIdx, blockIdx, blockDim, gridDim;

// As under nvcc, 16 bytes of any type may be read as one of these.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) double2 {
  double x, y;
};

namespace simt {

// Of the warps of a block; and when asynchronous copies land, which is as late as they may, but
// under kReverse as early: on a GPU anywhere between.
enum class Order { kForward, kReverse, kReverseLate };

// Of the static kind, what a block may have.
constexpr size_t kMostShared = 48 << 10;

// A fault to seed: in the launch of this number from now (0: the next one) every thread runs
// through its barrier of that number (from 0) as if it were not there.
struct MissingBarrier {
  int launch = -1, barrier = 0;
};
inline MissingBarrier missing_barrier;

// Only so many blocks of a launch are run, its last ones: of grids too large to run. 0: all.
inline unsigned last_blocks = 0;

// --- what the words below call ------------------------------------------------------------------
enum class Collective : uint64_t { kShuffleDown, kShuffleXor, kMultiply };

// What a lane brings to a collective of its warp, at most kMostWords of 64 bits.
constexpr unsigned kMostWords = 8;
using Lanes = uint64_t[32];

void barrier();
// Waits for every lane of the warp with the same call; the words of all 32, as [word][lane], this
// lane's number in `lane`.
const Lanes* exchange(unsigned mask, Collective call, unsigned argument, const uint64_t* words,
                      unsigned count, unsigned& lane);
// An asynchronous copy of the calling thread, which is to wait for it before it ends.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t prior);
// The calling block's own memory for a LYAPCUDA_SHARED, filled with NaN when its first thread gets
// there.
void* shared(const void* site, size_t bytes, size_t alignment);

template <class T>
T shuffle(unsigned mask, T value, Collective call, unsigned argument) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  unsigned lane = 0;
  const Lanes& lanes = *exchange(mask, call, argument, &bits, 1, lane);
  const unsigned from = call == Collective::kShuffleDown ? lane + argument : lane ^ argument;
  std::memcpy(&value, &lanes[from < 32 ? from : lane], sizeof(T));
  return value;
}

// --- launch -------------------------------------------------------------------------------------
using Thread = void (*)(void*);
void run(unsigned grid, unsigned block, Order order, Thread thread, void* context);

// kernel<<<grid, block>>>(arguments...): blocks one after another, each to its end. Throws
// std::runtime_error where CUDA would hang or leave the result undefined.
template <class... P, class... A>
void launch(unsigned grid, unsigned block, Order order, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, {std::forward<A>(arguments)...}};
  const auto thread = [](void* context) {
    const Call& c = *static_cast<const Call*>(context);
    std::apply(c.kernel, c.arguments);
  };
  run(grid, block, order, thread, &call);
}

}  // namespace simt

#define LYAPCUDA_SHARED(type, name)                         \
  static char name##_site;                                  \
  simt::Same<type>& name = *static_cast<simt::Same<type>*>( \
      ::simt::shared(&name##_site, sizeof(simt::Same<type>), alignof(simt::Same<type>)))

inline void __syncthreads() { simt::barrier(); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  simt::copy_later(to, from, bytes);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(size_t prior) { simt::wait_for_copies(prior); }

template <class V>
void __stwb(V* to, V value) {
  *to = value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return simt::shuffle(mask, value, simt::Collective::kShuffleDown, delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return simt::shuffle(mask, value, simt::Collective::kShuffleXor, lanes);
}

#endif
