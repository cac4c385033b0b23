// a·bᵀ of two panels of up to 128 rows each, in double.
//
//   gram<T, Side>      any grid of kGramThreads<Side>; b is not read where Side is symmetric
//                      partial: gram_row(pairs) doubles a block
//   gram_finish        (gram_finish.cuh) pairs and shape of the same
//
// Side: kSmall up to 32 rows in each panel, kLarge above; the symmetric ones for a = b. Pairs:
// symmetric_pairs(rows) or rectangular_pairs(rows, columns). Where the gate is closed nothing is
// read, and gram_finish writes zeros.
#pragma once

#include "gram_finish.cuh"

namespace lyapcuda::kernels {

enum class GramSide { kSmallSymmetric, kLargeSymmetric, kSmall, kLarge };

constexpr GramSide gram_side(bool symmetric, int rows, int columns) {
  const bool small = rows <= kSuper && columns <= kSuper;
  if (symmetric) return small ? GramSide::kSmallSymmetric : GramSide::kLargeSymmetric;
  return small ? GramSide::kSmall : GramSide::kLarge;
}

// Rows of the tile, threads of a block, and blocks that a multiprocessor is to hold.
template <GramSide kSide>
constexpr int kGramRows = kSide == GramSide::kSmallSymmetric   ? 32
                          : kSide == GramSide::kSmall          ? 64
                          : kSide == GramSide::kLargeSymmetric ? 128
                                                               : 256;
template <GramSide kSide>
constexpr int kGramThreads = kGramRows<kSide> <= 64 ? 256 : 512;
template <GramSide kSide>
constexpr int kGramBlocks = kSide == GramSide::kSmallSymmetric ? 3
                            : kSide == GramSide::kSmall        ? 2
                                                               : 1;

template <class T>
struct GramArguments {
  const T *a, *b;
  int64_t n;           // elements of a row, and what rows lie apart
  int rows, columns;   // of a, of b
  const double* gate;  // may be null
  double* partial;
};

template <class T, GramSide kSide>
__global__ void __launch_bounds__(kGramThreads<kSide>, kGramBlocks<kSide>)
    gram(const __grid_constant__ GramArguments<T> a) {
  constexpr bool kSymmetric =
      kSide == GramSide::kSmallSymmetric || kSide == GramSide::kLargeSymmetric;
  constexpr int kBlock = kGramThreads<kSide>, kWarpCount = kBlock / 32;
  using Sums = GramSums<T, kGramRows<kSide>, kWarpCount>;
  constexpr int kLength = Tile<T, kGramRows<kSide>>::kLength;
  LYAPCUDA_SHARED(typename Sums::Memory, memory);
  if (!is_open(a.gate)) return;
  const int warp = threadIdx.x / 32, supers = supers_of(a.rows), across = supers_of(a.columns);
  Sums sums(kSymmetric ? symmetric_share<kWarpCount>(warp, supers)
                       : rectangular_share<kWarpCount>(warp, supers, across));
  const bool aligned =
      rows_aligned16(a.a, a.n, a.rows) && (kSymmetric || rows_aligned16(a.b, a.n, a.columns));
  const int64_t tiles = (a.n + kLength - 1) / kLength;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kLength, left = a.n - begin;
    const int length = left < kLength ? static_cast<int>(left) : kLength;
    const bool wide = aligned && length == kLength;
    stage<kBlock>(memory.tile, 0, a.a, a.n, a.rows, begin, length, wide);
    if constexpr (!kSymmetric) {
      stage<kBlock>(memory.tile, supers * kSuper, a.b, a.n, a.columns, begin, length, wide);
    }
    __syncthreads();
    sums.add(memory.tile, a.rows);
    __syncthreads();
  }
  if constexpr (kSymmetric) {
    sums.finish(memory, a.partial, symmetric_pairs(a.rows), symmetric_slices<kWarpCount>(supers));
  } else {
    sums.finish(memory, a.partial, supers * across, kWarpCount / (supers * across));
  }
}

}  // namespace lyapcuda::kernels
