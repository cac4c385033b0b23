// A list of tensors, each beside its segment of the flat buffers, as one kernel argument: nothing
// to allocate or copy before a launch.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace lyapcuda::kernels {

// Bytes of a kernel's arguments: from CUDA 12.1 and sm_70 on; 4 KB before, which csrc/cuda/launch.h
// therefore refuses.
constexpr int kMostArguments = 32764;
// Tensors a launch. All the parameters of a GPT-2 (148) or a ResNet-50 (161) take one; a table is
// copied with every launch, so it is no larger than that asks for.
constexpr int kMaxSegments = 256;
constexpr int kGroupsPerChunk = 2;

// Work is dealt in chunks of one segment: small enough that 528 blocks (132 processors of 4) come
// out even at 10 million elements.
template <class P>
constexpr int kChunk = kThreads * kGroup<P> * kGroupsPerChunk;

template <class P, int kLists>
struct Segments {
  P* data[kLists][kMaxSegments];
  int64_t size[kMaxSegments];
  int64_t offset[kMaxSegments];           // into the flat buffers
  int64_t first_chunk[kMaxSegments + 1];  // [count]: the number of chunks
  int64_t count;
};

// Calls launch(table) for every kMaxSegments tensors that have elements; once if there are none.
// Kernels that cut work otherwise than the elementwise driver say into which chunks.
template <class P, int kLists, class F>
void for_each_table(P* const* const (&lists)[kLists], const int64_t* sizes, const int64_t* offsets,
                    int64_t count, const F& launch, int64_t chunk = kChunk<P>) {
  Segments<P, kLists> table{};
  static_assert(sizeof(table) + 256 <= kMostArguments);  // and the kernel's other arguments
  bool launched = false;
  for (int64_t i = 0; i < count; ++i) {
    if (sizes[i] == 0) continue;
    const int64_t s = table.count++;
    for (int list = 0; list < kLists; ++list) table.data[list][s] = lists[list][i];
    table.size[s] = sizes[i];
    table.offset[s] = offsets == nullptr ? 0 : offsets[i];
    table.first_chunk[s + 1] = table.first_chunk[s] + (sizes[i] + chunk - 1) / chunk;
    if (table.count == kMaxSegments) {
      launch(table);
      launched = true;
      table = {};
    }
  }
  if (table.count != 0 || !launched) launch(table);
}

// The segment that a chunk belongs to, not before `known`, that of the block's last chunk: in large
// segments the same, else looked for by halves.
template <class P, int kLists>
__device__ __forceinline__ int segment_of(const Segments<P, kLists>& table, int64_t chunk,
                                          int known) {
  if (chunk < table.first_chunk[known + 1]) return known;
  int least = known + 1, most = static_cast<int>(table.count) - 1;
  while (least < most) {
    const int middle = (least + most) / 2;
    if (chunk < table.first_chunk[middle + 1]) {
      most = middle;
    } else {
      least = middle + 1;
    }
  }
  return least;
}

}  // namespace lyapcuda::kernels
