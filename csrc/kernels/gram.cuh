// a·bᵀ of two panels of up to 128 rows each, in double.
//
//   gram<T, kSymmetric, kRows>  any grid of gram_threads(kRows)
//                               partial: gram_row(pairs) doubles a block
//   gram_finish                 (gram_finish.cuh) pairs and shape of the same
//
// kSymmetric: a = b, and b is not read. kRows, of the tile: the first of 8, 16, 32 and 128 that a
// has no more rows than; where a ≠ b 64 up to 32 rows in each panel, else 256. Pairs:
// symmetric_pairs(rows) or rectangular_pairs(rows, columns). Where the gate is closed nothing is
// read, and gram_finish writes zeros.
#pragma once

#include "gram_finish.cuh"

namespace lyapcuda::kernels {

// Threads of a block, and blocks that a multiprocessor is to hold.
__host__ __device__ constexpr int gram_threads(int rows) { return rows <= 64 ? 256 : 512; }
__host__ __device__ constexpr int gram_blocks(int rows) {
  return rows <= 32 ? 4 : rows <= 64 ? 2 : 1;
}

template <class T>
struct GramArguments {
  const T *a, *b;
  int64_t n;           // elements of a row, and what rows lie apart
  int rows, columns;   // of a, of b
  const double* gate;  // may be null
  double* partial;
};

template <class T, bool kSymmetric, int kRows>
__global__ void __launch_bounds__(gram_threads(kRows), gram_blocks(kRows))
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
  const auto work = [&](const TilePlace&, int slot) {
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
