// out_j = Σ_i panel_i·T(matrix[i][j]); out may start at the panel's own memory, with no more rows.
//
//   combine<T, kRows>  any grid of kThreads, up to ceil(n / kTransformLength<T, kRows>) of use;
//                      kRows: the first of 8, 16, 32, 128 that neither panel has more rows than
#pragma once

#include "panel_transform.cuh"

namespace lyapcuda::kernels {

template <class T>
struct CombineArguments {
  T* out;
  const T* panel;
  int64_t n;             // elements of a row
  int rows, columns;     // rows of panel, of out
  const double* matrix;  // (rows, columns)
  const double* gate;    // may be null; closed: out stays
};

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 4)
    combine(const __grid_constant__ CombineArguments<T> a) {
  using Work = Transform<T, kRows>;
  LYAPCUDA_SHARED(typename Work::Memory, memory);
  if (!is_open(a.gate)) return;
  Work work(memory, a.matrix, a.rows, a.columns);
  if (work.staged_whole()) work.stage_matrix(0);
  const bool aligned =
      rows_aligned16(a.panel, a.n, a.rows) && rows_aligned16(a.out, a.n, a.columns);
  constexpr int kLength = kTransformLength<T, kRows>;
  const auto fill = [&](int64_t tile, int slot) {
    const TilePlace place = place_of<kLength>(tile, a.n, aligned);
    stage<kThreads>(memory.tiles[slot], 0, a.panel, a.n, a.rows, place);
    return place;
  };
  const auto transform = [&](const TilePlace& place, int slot) {
    work.apply(memory.tiles[slot], [&](int j, int e, const T(&values)[Work::kStep]) {
      store_some(a.out + j * a.n + place.begin + e, values, place.length - e, place.aligned);
    });
  };
  for_each_tile<kSlots<kRows>>((a.n + kLength - 1) / kLength, fill, transform);
}

}  // namespace lyapcuda::kernels
