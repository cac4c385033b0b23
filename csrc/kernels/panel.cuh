// Panels (rows of equal length, one after another) by tiles in shared memory: what the kernels on
// several rows at once share.
#pragma once

#include "reduce.cuh"
#include "segments.cuh"
#include "vec.cuh"

namespace lyapcuda::kernels {

// A tile: kRows rows of kLength elements. 512 bytes of a row up to 64 rows, less above, so that
// static shared memory does. With the padding eight rows apart lie in different banks, by four
// elements each, and rows stay aligned to 16 bytes.
template <class T, int kRows>
struct Tile {
  static constexpr int kLength = (kRows <= 64 ? 512 : kRows <= 129 ? 256 : 128) / sizeof(T);
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

// N elements, or the first `left` of them and zeros where they are not all there or not aligned.
template <int N, class T, class P>
__device__ __forceinline__ void load_some(T (&to)[N], const P* from, int left, bool wide) {
  if (wide) {
    load_part(to, from);
  } else {
    LYAPCUDA_UNROLL
    for (int i = 0; i < N; ++i) to[i] = i < left ? T(widen(from[i])) : T(0);
  }
}

template <int N, class T, class P>
__device__ __forceinline__ void store_some(P* to, const T (&from)[N], int left, bool wide) {
  if (wide) {
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

// Rows [0, rows) of a panel, elements [begin, begin + length), to a tile; zeros up to its end. All
// threads of the block; wide says that the tile is full and its rows aligned.
template <int kBlock, class T, int kRows>
__device__ __forceinline__ void stage(Tile<T, kRows>& tile, int first_row, const T* panel,
                                      int64_t stride, int rows, int64_t begin, int length,
                                      bool wide) {
  constexpr int kStep = kGroup<T>, kGroups = Tile<T, kRows>::kLength / kStep;
  constexpr int kFlight = 4;  // loads that a thread issues before it uses the first
  if (wide) {
    const int count = rows * kGroups;
    LYAPCUDA_ROLLED
    for (int item = threadIdx.x; item < count; item += kBlock * kFlight) {
      T held[kFlight][kStep];
      LYAPCUDA_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int at = item + f * kBlock;
        if (at < count) load(held[f], panel + at / kGroups * stride + begin + at % kGroups * kStep);
      }
      LYAPCUDA_UNROLL
      for (int f = 0; f < kFlight; ++f) {
        const int at = item + f * kBlock;
        if (at < count) put(tile.row(first_row + at / kGroups) + at % kGroups * kStep, held[f]);
      }
    }
  } else {
    constexpr int kLength = Tile<T, kRows>::kLength;
    LYAPCUDA_ROLLED
    for (int item = threadIdx.x; item < rows * kLength; item += kBlock) {
      const int row = item / kLength, e = item % kLength;
      tile.row(first_row + row)[e] = e < length ? panel[row * stride + begin + e] : T(0);
    }
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
