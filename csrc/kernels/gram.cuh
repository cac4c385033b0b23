// a·bᵀ of two panels of up to 128 rows each, in double.
//
//   gram<T, kSymmetric, kWeighted, kRows>  any grid of gram_threads(kRows)
//                                          partial: gram_row(pairs) doubles a block
//   gram_finish                            (gram_finish.cuh) pairs and shape of the same
//
// kSymmetric: a = b, and b is not read. kWeighted: each element is taken times its weight, and
// rounded. kRows, of the tile: the first of 8, 16, 32 and 128 that a has no more rows than; where
// a ≠ b 64 up to 32 rows in each panel, else 256. Pairs: symmetric_pairs(rows) or
// rectangular_pairs(rows, columns). Where the gate is closed nothing is read, and gram_finish
// writes zeros.
#pragma once

#include "gram_finish.cuh"
#include "pack.cuh"

namespace lyapcuda::kernels {

// Threads of a block, and blocks that a multiprocessor is to hold.
__host__ __device__ constexpr int gram_threads(int rows) { return rows <= 64 ? 256 : 512; }
__host__ __device__ constexpr int gram_blocks(int rows, bool weighted) {
  if (rows == 32 && weighted) return 3;
  return rows <= 32 ? 4 : rows <= 64 ? 2 : 1;
}

template <class T>
struct GramArguments {
  const T *a, *b;
  int64_t n;           // elements of a row, and what rows lie apart
  int rows, columns;   // of a, of b
  const double* gate;  // may be null
  const T* weights;
  double* partial;
};

// Takes each element of a tile times its weight: those that this thread copied there (stage).
template <int kBlock, class T, int kRows>
__device__ __forceinline__ void weigh(Tile<T, kRows>& tile, int first_row, int rows,
                                      const T* weights, const TilePlace& place) {
  constexpr int kStep = kGroup<T>, kGroups = Tile<T, kRows>::kLength / kStep;
  static_assert(kBlock % kGroups == 0);  // a thread's elements are the same in all its rows
  const int e = threadIdx.x % kGroups * kStep, left = place.length - e;
  const T* const from = weights + place.begin + e;
  Pack<T, kStep> weight;
  if (left >= kStep && aligned16(from)) {
    load(weight.of, from);
  } else {
    LYAPCUDA_UNROLL
    for (int i = 0; i < kStep; ++i) weight.of[i] = i < left ? from[i] : T(0);
  }
  LYAPCUDA_ROLLED
  for (int row = threadIdx.x / kGroups; row < rows; row += kBlock / kGroups) {
    Pack<T, kStep> values;
    T* const at = tile.row(first_row + row) + e;
    get(values.of, at);
    put(at, (values * weight).of);
  }
}

template <class T, bool kSymmetric, bool kWeighted, int kRows>
__global__ void __launch_bounds__(gram_threads(kRows), gram_blocks(kRows, kWeighted))
    gram(const __grid_constant__ GramArguments<T> a) {
  constexpr int kBlock = gram_threads(kRows), kWarpCount = kBlock / 32;
  using Sums = GramSums<T, kRows, kWarpCount>;
  constexpr int kLength = Tile<T, kRows>::kLength;
  LYAPCUDA_SHARED(typename Sums::Memory, memory);
  if (!is_open(a.gate)) return;
  const int warp = threadIdx.x / 32, supers = supers_of(a.rows), across = supers_of(a.columns);
  Sums sums(kSymmetric ? symmetric_share<kWarpCount>(warp, supers)
                       : rectangular_share<kWarpCount>(warp, supers, across));
  const bool aligned =
      rows_aligned16(a.a, a.n, a.rows) && (kSymmetric || rows_aligned16(a.b, a.n, a.columns));
  const auto fill = [&](int64_t tile, int slot) {
    const TilePlace place = place_of<kLength>(tile, a.n, aligned);
    stage<kBlock>(memory.tiles[slot], 0, a.a, a.n, a.rows, place);
    if constexpr (!kSymmetric) {
      stage<kBlock>(memory.tiles[slot], supers * kSuper, a.b, a.n, a.columns, place);
    }
    return place;
  };
  const auto work = [&](const TilePlace& place, int slot) {
    if constexpr (kWeighted) {
      weigh<kBlock>(memory.tiles[slot], 0, a.rows, a.weights, place);
      if constexpr (!kSymmetric) {
        weigh<kBlock>(memory.tiles[slot], supers * kSuper, a.columns, a.weights, place);
      }
    }
    __syncthreads();
    sums.add(memory.tiles[slot], a.rows);
  };
  for_each_tile<kSlots<kRows>>((a.n + kLength - 1) / kLength, fill, work);
  __syncthreads();
  if constexpr (kSymmetric) {
    sums.finish(memory, a.partial, symmetric_pairs(a.rows), symmetric_slices<kWarpCount>(supers));
  } else {
    sums.finish(memory, a.partial, supers * across, kWarpCount / (supers * across));
  }
}

}  // namespace lyapcuda::kernels
