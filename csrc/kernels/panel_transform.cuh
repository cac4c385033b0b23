// Panel × small matrix, by tiles in shared memory: out_j = Σ_i panel_i·T(matrix[i][j]), i
// ascending, each product and each sum rounded in T.
#pragma once

#include "pack.cuh"
#include "panel.cuh"

namespace lyapcuda::kernels {

// kRows: 8, 16, 32 or 128, the most rows of the panel and columns of the matrix. Where the matrix
// is too large for shared memory it goes there a few columns at a time.
template <class T, int kRows>
struct Transform {
  static constexpr int kColumns = 4;  // that a thread works out at once, for kGroup<T> elements
  static constexpr int kStaged = kRows <= 32 ? kRows * kRows : 12288 / int{sizeof(T)};
  static constexpr int kStep = kGroup<T>;
  static constexpr int kGroups = Tile<T, kRows>::kLength / kStep;

  struct Memory {
    Tile<T, kRows> tiles[kSlots<kRows>];
    alignas(16) T matrix[kStaged];
  };

  Memory& memory;
  const double* matrix;
  int rows, columns;
  int across;  // columns staged at a time, a multiple of kColumns

  __device__ Transform(Memory& shared, const double* of, int rows_, int columns_)
      : memory(shared), matrix(of), rows(rows_), columns(columns_) {
    const int fit = kStaged / rows / kColumns * kColumns;
    const int all = (columns + kColumns - 1) / kColumns * kColumns;
    across = all < fit ? all : fit;
  }

  __device__ __forceinline__ bool staged_whole() const { return across >= columns; }

  __device__ __forceinline__ void stage_matrix(int first) {
    for (int item = threadIdx.x; item < rows * across; item += kThreads) {
      const int i = item / across, j = first + item % across;
      memory.matrix[item] = j < columns ? static_cast<T>(matrix[i * columns + j]) : T(0);
    }
  }

  // write(j, e, values): column j, elements e to e + kStep of the tile.
  template <class Write>
  __device__ __forceinline__ void columns_from(const Tile<T, kRows>& tile, int first,
                                               const Write& write) {
    const int blocks = (columns - first < across ? columns - first : across) + kColumns - 1;
    LYAPCUDA_ROLLED
    for (int item = threadIdx.x; item < blocks / kColumns * kGroups; item += kThreads) {
      const int e = item % kGroups * kStep, at = item / kGroups * kColumns;
      T out[kColumns][kStep];
      const T* const coefficients = memory.matrix + at;
      row<true>(out, tile.row(0) + e, coefficients);
      LYAPCUDA_UNROLL_BY(2)
      for (int i = 1; i < rows; ++i) row<false>(out, tile.row(i) + e, coefficients + i * across);
      LYAPCUDA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (first + at + c < columns) write(first + at + c, e, out[c]);
      }
    }
  }

  // All columns from a tile whose copies every thread has waited for. Where staged_whole(),
  // stage_matrix(0) has come before, once.
  template <class Write>
  __device__ __forceinline__ void apply(const Tile<T, kRows>& tile, const Write& write) {
    if (staged_whole()) {
      __syncthreads();
      columns_from(tile, 0, write);
      return;
    }
    for (int first = 0; first < columns; first += across) {
      __syncthreads();
      stage_matrix(first);
      __syncthreads();
      columns_from(tile, first, write);
    }
  }

 private:
  template <bool kFirst>
  __device__ __forceinline__ void row(T (&out)[kColumns][kStep], const T* from,
                                      const T* coefficients) {
    T x[kStep], m[kColumns];
    get(x, from);
    get(m, coefficients);
    LYAPCUDA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      LYAPCUDA_UNROLL
      for (int k = 0; k < kStep; ++k) {
        const Pack<T, 1> element{x[k]}, sum{out[c][k]};
        out[c][k] = (kFirst ? element * m[c] : with_row(sum, element, m[c])).of[0];
      }
    }
  }
};

// Elements of a tile, what launches cut work by.
template <class T, int kRows>
constexpr int kTransformLength = Tile<T, kRows>::kLength;

}  // namespace lyapcuda::kernels
