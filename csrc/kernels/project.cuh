// w −= Σ_i T(c_i)·v_i, i ascending, and the products of the new w with every v_i and itself, in one
// pass over v: a tile of v stays in shared memory between the two.
//
//   project<T, kRows>   any grid of kThreads, up to ceil(n / kProjectLength<T, kRows>) of use;
//                       kRows: the first of 16, 32, 129 that has room for one more row than v's
//                       partial: [blocks, rows + 1]
//   project_finish      (project_finish.cuh) partial to the rows + 1 sums
#pragma once

#include "pack.cuh"
#include "project_finish.cuh"
#include "row_sums.cuh"

namespace lyapcuda::kernels {

template <class T>
struct ProjectArguments {
  T* w;
  const T* v;
  int64_t n;
  int rows;  // of v, may be 0
  const double* coefficients;
  double* partial;
};

template <class T, int kRows>
constexpr int kProjectLength = Tile<T, kRows>::kLength;

template <class T, int kRows>
struct ProjectMemory {
  Tile<T, kRows> tiles[kSlots<kRows>];  // v, then the new w
  T coefficients[kRows];
};

__host__ __device__ constexpr int project_blocks(int rows) { return rows <= 32 ? 5 : 3; }

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, project_blocks(kRows))
    project(const __grid_constant__ ProjectArguments<T> a) {
  constexpr int kLength = kProjectLength<T, kRows>;
  using Memory = ProjectMemory<T, kRows>;
  LYAPCUDA_SHARED(Memory, memory);
  for (int i = threadIdx.x; i < a.rows; i += kThreads) {
    memory.coefficients[i] = static_cast<T>(a.coefficients[i]);
  }
  const bool aligned = rows_aligned16(a.v, a.n, a.rows);
  const int e = threadIdx.x;  // this thread's element of a tile
  static_assert(kLength <= kThreads);
  struct Place : TilePlace {
    T w;  // on its way as well
  };
  const auto fill = [&](int64_t tile, int slot) {
    Place place{place_of<kLength>(tile, a.n, aligned), T(0)};
    if (e < place.length) place.w = a.w[place.begin + e];
    stage<kThreads>(memory.tiles[slot], 0, a.v, a.n, a.rows, place);
    return place;
  };
  RowSums<T, kRows> sums;
  const auto work = [&](const Place& place, int slot) {
    Tile<T, kRows>& tile = memory.tiles[slot];
    __syncthreads();
    if (e < kLength) {
      Pack<T, 1> w{place.w};
      LYAPCUDA_UNROLL_BY(4)
      for (int i = 0; i < a.rows; ++i) {
        w = without_row(w, Pack<T, 1>{tile.row(i)[e]}, memory.coefficients[i]);
      }
      if (e < place.length) a.w[place.begin + e] = w.of[0];
      tile.row(a.rows)[e] = w.of[0];
    }
    __syncthreads();
    sums.add(tile, a.rows + 1, a.rows);
  };
  for_each_tile<kSlots<kRows>>((a.n + kLength - 1) / kLength, fill, work);
  sums.finish(a.partial, a.rows + 1);
}

}  // namespace lyapcuda::kernels
