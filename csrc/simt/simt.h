// The CUDA words that csrc/kernels uses, for g++: the threads of a block are fibers of one thread,
// so the same kernel text runs, and is tested under sanitizers, without a GPU. Under nvcc this file
// only keeps the spellings that differ.
//
// One dimension, full warps. It sees wrong results, overruns (with ASan or guard bytes), barriers
// that not all threads reach and shuffles that not all lanes reach; a race shows up in one of the
// two orders of warps, so run both. UBSan sees misaligned accesses. It is blind to the memory model
// within a warp, and to speed.
#pragma once

namespace simt {
// Lets an array type stand before the name: LYAPCUDA_SHARED(double[8], rows).
template <class T>
using Same = T;
}  // namespace simt

#ifdef __CUDACC__

// __shared__ with one difference: the emulator fills it with NaN at the start of a block.
#define LYAPCUDA_SHARED(type, name) __shared__ simt::Same<type> name
#define LYAPCUDA_UNROLL _Pragma("unroll")
#define LYAPCUDA_ROLLED _Pragma("unroll 1")

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

struct Simt1 {
  unsigned x;
};
inline Simt1 threadIdx, blockIdx, blockDim, gridDim;

// As under nvcc, 16 bytes of any type may be read as one of these.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) double2 {
  double x, y;
};

namespace simt {

enum class Order { kForward, kReverse };

// --- what the words below call ------------------------------------------------------------------
enum class Shuffle : uint64_t { kDown, kXor };

void barrier();
// Waits for every lane of the warp with the same call; the 32 values, this lane's number in `lane`.
const uint64_t* exchange(unsigned mask, Shuffle call, unsigned argument, uint64_t value,
                         unsigned& lane);
// Fills shared memory with NaN when the first thread of a block gets there.
void poison_once(void* memory, size_t bytes);

template <class T>
T shuffle(unsigned mask, T value, Shuffle call, unsigned argument) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  unsigned lane = 0;
  const uint64_t* const lanes = exchange(mask, call, argument, bits, lane);
  const unsigned from = call == Shuffle::kDown ? lane + argument : lane ^ argument;
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

#define LYAPCUDA_SHARED(type, name) \
  static simt::Same<type> name;     \
  ::simt::poison_once(&name, sizeof(name))

inline void __syncthreads() { simt::barrier(); }

template <class V>
void __stwb(V* to, V value) {
  *to = value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return simt::shuffle(mask, value, simt::Shuffle::kDown, delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return simt::shuffle(mask, value, simt::Shuffle::kXor, lanes);
}

#endif
