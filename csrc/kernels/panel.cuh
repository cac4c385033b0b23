// Panels (rows of equal length, one after another) by tiles in shared memory: what the kernels on
// several rows at once share.
#pragma once

#include <type_traits>

#include "reduce.cuh"
#include "segments.cuh"
#include "vec.cuh"

namespace lyapcuda::kernels {

// Calls f with the first of kRows, which ascend, that so many rows fit in, as an integral_constant:
// the tile that a kernel is to have.
template <int kRows, int... kMore, class F>
void with_rows(int64_t rows, const F& f) {
  if constexpr (sizeof...(kMore) == 0) {
    f(std::integral_constant<int, kRows>{});
  } else {
    rows <= kRows ? f(std::integral_constant<int, kRows>{}) : with_rows<kMore...>(rows, f);
  }
}

// Bytes of a row that a tile has: the fewer rows, the more of each, so that as much is on its way.
__host__ __device__ constexpr int tile_bytes(int rows) {
  return rows <= 8 ? 2048 : rows <= 16 ? 1024 : rows <= 64 ? 512 : rows <= 129 ? 256 : 128;
}

// A tile: kRows rows of kLength elements. With the padding eight rows apart lie in different banks,
// by four elements each, and rows stay aligned to 16 bytes.
template <class T, int kRows>
struct Tile {
  static constexpr int kLength = tile_bytes(kRows) / sizeof(T);
  static constexpr int kStride = kLength + 4;
  alignas(16) T data[kRows * kStride];

  __device__ __forceinline__ T* row(int r) { return data + r * kStride; }
  __device__ __forceinline__ const T* row(int r) const { return data + r * kStride; }
};

// N = 1, or whole vectors of 16 bytes of shared memory. (store() of vec.cuh is for global memory.)
template <int N, class T>
__device__ __forceinline__ void put(T* to, const T (&from)[N]) {
  if constexpr (N == 1) {
    to[0] = from[0];
  } else {
    LYAPCUDA_UNROLL
    for (int k = 0; k < N; k += kGroup<T>) {
      if constexpr (sizeof(T) == sizeof(float)) {
        *reinterpret_cast<float4*>(to + k) = float4{from[k], from[k + 1], from[k + 2], from[k + 3]};
      } else {
        *reinterpret_cast<double2*>(to + k) = double2{from[k], from[k + 1]};
      }
    }
  }
}

template <int N, class T>
__device__ __forceinline__ void get(T (&to)[N], const T* from) {
  LYAPCUDA_UNROLL
  for (int k = 0; k < N; k += kGroup<T>) {
    Sixteen<T> block;
    block.whole = *reinterpret_cast<const typename Wide<T>::type*>(from + k);
    LYAPCUDA_UNROLL
    for (int i = 0; i < kGroup<T>; ++i) to[k + i] = block.parts[i];
  }
}

// N elements, or the first `left` of them where they are not all there or not aligned.
template <int N, class T, class P>
__device__ __forceinline__ void store_some(P* to, const T (&from)[N], int left, bool aligned) {
  if (aligned && left >= N) {
    store_part(to, from);
  } else {
    LYAPCUDA_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i < left) narrow(from[i], to[i]);
    }
  }
}

// Whether every row may be accessed by 16 bytes, at elements divisible by a group.
template <class P>
__device__ __forceinline__ bool rows_aligned16(const P* data, int64_t stride, int rows) {
  return aligned16(data) && (rows == 1 || stride % kGroup<P> == 0);
}

// Tiles that static shared memory has room for: with two, the next one is on its way while the one
// at hand is worked on.
template <int kRows>
constexpr int kSlots = kRows <= 33 ? 2 : 1;

// Where a tile lies.
struct TilePlace {
  int64_t begin;  // in a row of the panel
  int length;
  bool aligned;  // every row, to 16 bytes
};

// The place of a tile of a panel whose rows are one segment of n elements.
template <int kLength>
__device__ __forceinline__ TilePlace place_of(int64_t tile, int64_t n, bool aligned) {
  const int64_t begin = tile * kLength, left = n - begin;
  const int length = left < kLength ? static_cast<int>(left) : kLength;
  return {begin, length, aligned};
}

// The place of a tile of a table of segments, whose chunks are tiles.
struct SegmentPlace : TilePlace {
  int64_t inside;  // of the segment's tensors
};

template <int kLength, class P, int kLists>
__device__ __forceinline__ SegmentPlace place_in(const Segments<P, kLists>& table, int segment,
                                                 int64_t tile, bool aligned) {
  const int64_t inside = (tile - table.first_chunk[segment]) * kLength;
  const int64_t left = table.size[segment] - inside;
  aligned = aligned && table.offset[segment] % kGroup<P> == 0;
  LYAPCUDA_UNROLL
  for (int list = 0; list < kLists; ++list) {
    aligned = aligned && aligned16(table.data[list][segment]);
  }
  return {
      {table.offset[segment] + inside, left < kLength ? static_cast<int>(left) : kLength, aligned},
      inside};
}

// Calls work(place, slot) for every tile of this block in turn. fill(tile, slot) starts the copies
// of a tile to a slot and returns its place. work() finds this thread's own copies done, and those
// of others after a barrier of its own.
template <int kSlotCount, class Fill, class Work>
__device__ __forceinline__ void for_each_tile(int64_t tiles, const Fill& fill, const Work& work) {
  int64_t tile = blockIdx.x;
  if (tile >= tiles) return;
  auto place = fill(tile, 0);
  __pipeline_commit();
  LYAPCUDA_ROLLED
  for (int slot = 0;; slot ^= kSlotCount - 1) {
    tile += gridDim.x;
    auto ahead = place;
    if (kSlotCount == 2 && tile < tiles) ahead = fill(tile, slot ^ 1);
    __pipeline_commit();
    __pipeline_wait_prior(kSlotCount - 1);
    work(place, slot);
    if (tile >= tiles) return;
    __syncthreads();  // all are done with the slot
    if (kSlotCount == 1) ahead = fill(tile, 0);
    place = ahead;
  }
}

// Starts the copy of N elements to shared memory, as they are; where they are not all there or not
// aligned copies the first `left`, and zeros.
template <int N, class P>
__device__ __forceinline__ void start_copy(void* to, const P* from, int left, bool aligned) {
  constexpr size_t kBytes = N * sizeof(P);
  static_assert(kBytes == 8 || kBytes == 16);
  if (aligned && left >= N) {
    __pipeline_memcpy_async(to, from, kBytes);
    return;
  }
  Sixteen<P> held;
  LYAPCUDA_UNROLL
  for (int i = 0; i < N; ++i) held.parts[i] = i < left ? from[i] : P{};
  if constexpr (kBytes == 16) {
    *static_cast<typename Wide<P>::type*>(to) = held.whole;
  } else {
    Eight<P> half;
    LYAPCUDA_UNROLL
    for (int i = 0; i < N; ++i) half.parts[i] = held.parts[i];
    *static_cast<uint2*>(to) = half.whole;
  }
}

// Starts the copy of rows [0, rows) of a panel, elements [begin, begin + length), to a tile; zeros
// up to its end. All threads of the block.
template <int kBlock, class T, int kRows>
__device__ __forceinline__ void stage(Tile<T, kRows>& tile, int first_row, const T* panel,
                                      int64_t stride, int rows, const TilePlace& place) {
  constexpr int kStep = kGroup<T>, kGroups = Tile<T, kRows>::kLength / kStep;
  LYAPCUDA_ROLLED
  for (int item = threadIdx.x; item < rows * kGroups; item += kBlock) {
    const int row = item / kGroups, e = item % kGroups * kStep;
    start_copy<kStep>(tile.row(first_row + row) + e, panel + row * stride + place.begin + e,
                      place.length - e, place.aligned);
  }
}

// A closed gate keeps a kernel from doing anything; none is an open one.
__device__ __forceinline__ bool is_open(const double* gate) {
  return gate == nullptr || *gate != 0.0;
}

// The second stage of sums that lie column by column: block b brings columns 32·b to 32·b + 31 of
// `count` rows together, in an order that count alone fixes. Warp 0 gets column 32·b + lane.
__device__ __forceinline__ double sum_column(const double* rows, int64_t count, int64_t width,
                                             int64_t column, bool wanted) {
  LYAPCUDA_SHARED(double[kWarps][32], parts);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double sum = 0.0;
  if (wanted) {
    LYAPCUDA_UNROLL_BY(4)
    for (int64_t row = warp; row < count; row += kWarps) sum += rows[row * width + column];
  }
  parts[warp][lane] = sum;
  __syncthreads();
  sum = 0.0;
  LYAPCUDA_UNROLL
  for (int w = 0; w < kWarps; ++w) sum += parts[w][lane];
  return sum;
}

}  // namespace lyapcuda::kernels
