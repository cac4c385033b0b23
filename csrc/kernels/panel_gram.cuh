// Gram matrices of tiles in shared memory, in double, on the tensor cores (mma.cuh).
//
// Rows go by super-blocks of 32. Each warp adds up one pair of super-blocks over its share of a
// tile's elements, in registers, over all tiles of its block; the shares are then added in order, a
// row of partial sums a block goes to global memory, and gram_finish adds those.
#pragma once

#include "mma.cuh"
#include "panel.cuh"

namespace lyapcuda::kernels {

constexpr int kSuper = 32;          // rows of a super-block
constexpr int kPairSums = 32 * 32;  // entries of the product of two

__host__ __device__ constexpr int supers_of(int rows) { return (rows + kSuper - 1) / kSuper; }

// What a warp adds up: a pair of super-blocks, every slices-th four elements from the slice-th on.
struct Share {
  int pair, row, column, slice, slices;  // slices = 0: nothing

  // In one register, for the time between its uses.
  __device__ __forceinline__ int packed() const {
    return pair | row << 5 | column << 9 | slice << 13 | slices << 18;
  }
  static __device__ __forceinline__ Share of(int packed) {
    return {packed & 31, packed >> 5 & 15, packed >> 9 & 15, packed >> 13 & 31, packed >> 18};
  }
};

// Pairs (I, J), I <= J, of the stack's own Gram matrix: number J(J + 1)/2 + I. Those on the
// diagonal are 10 products of the 16 that others are: warps are dealt out so, and alike to the four
// schedulers of a multiprocessor.
template <int kWarpCount>
__device__ __forceinline__ Share symmetric_share(int warp, int supers) {
  const auto share = [](int row, int column, int slice, int slices) {
    return Share{column * (column + 1) / 2 + row, row, column, slice, slices};
  };
  if (supers == 1) return share(0, 0, warp, kWarpCount);
  if (supers == 2) {
    constexpr int kHalf = kWarpCount / 2, kQuarter = kWarpCount / 4;
    if (warp < kHalf) return share(0, 1, warp, kHalf);
    const int diagonal = (warp - kHalf) / kQuarter;
    return share(diagonal, diagonal, (warp - kHalf) % kQuarter, kQuarter);
  }
  // Three or four, by 16 warps.
  const int each = supers == 3 ? 3 : 2;  // warps of a pair off the diagonal
  const int off = warp / each, rest = warp - each * (supers == 3 ? 3 : 6);
  if (rest < 0) {
    const int column = off == 0 ? 1 : off < 3 ? 2 : 3;
    return share(off - column * (column - 1) / 2, column, warp % each, each);
  }
  const int of_diagonal = supers == 3 ? 2 : 1, diagonal = rest / of_diagonal;
  if (diagonal >= supers) return Share{0, 0, 0, 0, 0};
  return share(diagonal, diagonal, rest % of_diagonal, of_diagonal);
}

// The most slices that one pair has.
template <int kWarpCount>
__device__ __forceinline__ int symmetric_slices(int supers) {
  return supers == 1 ? kWarpCount : supers == 2 ? kWarpCount / 2 : supers == 3 ? 3 : 2;
}

// Pairs of a super-block of the one panel and one of the other: number I·columns + J.
template <int kWarpCount>
__device__ __forceinline__ Share rectangular_share(int warp, int rows, int columns) {
  const int slices = kWarpCount / (rows * columns), pair = warp / slices;
  if (pair >= rows * columns) return Share{0, 0, 0, 0, 0};
  return Share{pair, pair / columns, rows + pair % columns, warp % slices, slices};
}

template <class T, int kRows, int kWarpCount>
struct GramSums {
  static constexpr int kHalf = kPairSums / 2;  // what a warp hands over at a time
  static constexpr int kRegions = kRows <= kSuper       ? 1
                                  : kRows / kSuper == 2 ? 3
                                                        : 8;  // pairs that several warps share

  // Shared memory: the tiles, and once all are done what warps hand over.
  union Memory {
    Tile<T, kRows> tiles[kSlots<kRows>];
    double handed[kRegions * kHalf];
  };

  int packed;
  double sums[4][4][2] = {};

  __device__ explicit GramSums(const Share& of) : packed(of.packed()) {}

  template <bool kUpper, int kBlocks>
  __device__ __forceinline__ void add_blocks(const Tile<T, kRows>& tile, const Share& share) {
    constexpr int kStride = Tile<T, kRows>::kStride, kLength = Tile<T, kRows>::kLength;
    const int lane = threadIdx.x % 32, at = lane / 4 * kStride + lane % 4;
    const T* const upper = tile.row(share.row * kSuper) + at;
    const T* const across = tile.row(share.column * kSuper) + at;
    LYAPCUDA_ROLLED  // other warps hide the latency; more fragments at once would not fit
        for (int e = share.slice * 4; e < kLength; e += share.slices * 4) {
      double a[4], b[4];
      LYAPCUDA_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        a[i] = static_cast<double>(upper[i * 8 * kStride + e]);
        b[i] = kUpper ? a[i] : static_cast<double>(across[i * 8 * kStride + e]);
      }
      multiply_add<kUpper, kBlocks, kBlocks>(sums, a, b);
    }
  }

  // The whole tile; all its rows up to `rows` are in place, what lies behind them is not used.
  __device__ __forceinline__ void add(const Tile<T, kRows>& tile, int rows) {
    const Share share = Share::of(packed);
    if (share.slices == 0) return;
    if constexpr (kRows <= kSuper) {
      // A single triangle, of no more blocks of 8 than there are rows.
      if constexpr (kRows > 24) {
        if (rows > 24) return add_blocks<true, 4>(tile, share);
      }
      if constexpr (kRows > 16) {
        if (rows > 16) return add_blocks<true, 3>(tile, share);
      }
      if constexpr (kRows > 8) {
        if (rows > 8) return add_blocks<true, 2>(tile, share);
      }
      add_blocks<true, 1>(tile, share);
    } else if (share.row == share.column) {
      add_blocks<true, 4>(tile, share);
    } else {
      add_blocks<false, 4>(tile, share);
    }
  }

  // Adds the slices of every pair, the first one's sums first, and writes them as a row of `pairs`
  // times kPairSums: entry (8·i + l / 4, 8·j + 2·(l % 4) + c) of a pair at ((i·4 + j)·2 + c)·32 +
  // l; those of rows that the tile has not stay. After a barrier, once a kernel.
  __device__ __forceinline__ void finish(Memory& memory, double* partial, int pairs,
                                         int most_slices) {
    const Share share = Share::of(packed);
    const int lane = threadIdx.x % 32;
    double* const region = memory.handed + share.pair % kRegions * kHalf + lane;
    for (int slice = 1; slice < most_slices; ++slice) {
      LYAPCUDA_UNROLL
      for (int half = 0; half < (kBlocks + 1) / 2; ++half) {
        if (share.slices != 0 && share.slice == slice) {
          LYAPCUDA_UNROLL
          for (int v = half * 16; v < half * 16 + 16; ++v) {
            if (is_there(v)) region[v % 16 * 32] = sum(v);
          }
        }
        __syncthreads();
        if (share.slice == 0 && slice < share.slices) {
          LYAPCUDA_UNROLL
          for (int v = half * 16; v < half * 16 + 16; ++v) {
            if (is_there(v)) sum(v) += region[v % 16 * 32];
          }
        }
        __syncthreads();
      }
    }
    if (share.slices == 0 || share.slice != 0) return;
    double* const out = partial + (int64_t{blockIdx.x} * pairs + share.pair) * kPairSums + lane;
    LYAPCUDA_UNROLL
    for (int v = 0; v < 32; ++v) {
      if (is_there(v)) out[v * 32] = sum(v);
    }
  }

 private:
  static constexpr int kBlocks = kRows < kSuper ? kRows / 8 : kSuper / 8;  // of 8 rows

  // The values of this lane, by their place in a row of sums; of a single triangle alone what is in
  // it.
  __device__ __forceinline__ double& sum(int v) { return sums[v / 8][v / 2 % 4][v % 2]; }
  static __device__ __forceinline__ constexpr bool is_there(int v) {
    const int i = v / 8, j = v / 2 % 4;
    return i < kBlocks && j < kBlocks && (kRows > kSuper || i <= j);
  }
};

// Pairs of super-blocks, and with that the doubles of a row of partial sums.
__host__ __device__ constexpr int symmetric_pairs(int rows) {
  return supers_of(rows) * (supers_of(rows) + 1) / 2;
}
__host__ __device__ constexpr int rectangular_pairs(int rows, int columns) {
  return supers_of(rows) * supers_of(columns);
}
__host__ __device__ constexpr int64_t gram_row(int pairs) { return int64_t{pairs} * kPairSums; }

// gram_finish (gram_finish.cuh): `count` rows of partial sums, those of all launches, to the Gram
// matrix (rows, columns). Grid: gram_finish_blocks(pairs), of kThreads. Where the gate is closed:
// zeros.
__host__ __device__ constexpr int gram_finish_blocks(int pairs) { return pairs * (kPairSums / 32); }

struct GramShape {
  int rows, columns;
  bool symmetric;  // rows = columns; out comes out exactly symmetric
};

}  // namespace lyapcuda::kernels
