// The products of a direction with the rows of a panel; the momentum's buffer takes the gradient in
// on the way. A tile of the rows is in shared memory, with u as one more.
//
//   slopes<T, P, kMomentum, kRows>
//                     any grid of kThreads, a launch per table of for_each_table with chunks of
//                     kSlopesLength<T, kRows>; partial: [blocks, k]
//   project_finish    (project_finish.cuh) partial, all launches' rows, to the k sums
//                     (rows = k − 1)
//
// kRows: the first of 16, 33 that has room for k + 1.
#pragma once

#include "pack.cuh"
#include "project_finish.cuh"
#include "row_sums.cuh"

namespace lyapcuda::kernels {

template <class P>
using DirectionSegments = Segments<P, 2>;  // θ, its gradient

template <class T, int kRows>
constexpr int kSlopesLength = Tile<T, kRows>::kLength;

template <class T>
struct SlopesArguments {
  const T* panel;
  int64_t n;
  int k;
  T* buffer;
  const double *state, *factor;
  double weight_decay, momentum;
  double* partial;
};

template <class T, class P, Momentum kMomentum, int kRows>
__global__ void __launch_bounds__(kThreads, 4)
    slopes(const __grid_constant__ DirectionSegments<P> table,
           const __grid_constant__ SlopesArguments<T> a) {
  constexpr int kLength = kSlopesLength<T, kRows>;
  static_assert(kLength <= kThreads);
  using Memory = Tile<T, kRows>;  // rows of the panel; u in the last
  LYAPCUDA_SHARED(Memory[kSlots<kRows>], tiles);
  const Newton newton{a.state, a.k, 1.0, 1.0};
  const int rows = newton.has_vectors() ? a.k : 0;
  const bool go = newton.go(factor_of(a.factor)) && (rows != 0 || kMomentum != Momentum::kNone);
  const DirectionFactors<T> factors{static_cast<T>(a.weight_decay), static_cast<T>(a.momentum)};
  const bool aligned = rows_aligned16(a.panel, a.n, a.k);
  const int e = threadIdx.x;  // this thread's element of a tile
  struct Place : SegmentPlace {
    P theta, gradient;  // on their way as well
    T held;
  };
  int segment = 0;
  const auto fill = [&](int64_t tile, int slot) {
    segment = segment_of(table, tile, segment);
    Place place{place_in<kLength>(table, segment, tile, aligned), P{}, P{}, T(0)};
    if (e < place.length) {
      place.theta = table.data[0][segment][place.inside + e];
      place.gradient = table.data[1][segment][place.inside + e];
      if constexpr (kMomentum != Momentum::kNone) place.held = a.buffer[place.begin + e];
    }
    stage<kThreads>(tiles[slot], 0, a.panel, a.n, rows, place);
    return place;
  };
  RowSums<T, kRows> sums;
  const auto work = [&](const Place& place, int slot) {
    Tile<T, kRows>& tile = tiles[slot];
    if (e < kLength) {
      Pack<T, 1> u{}, held{place.held};
      if (e < place.length) {
        u = direction<kMomentum, true>(Pack<T, 1>{widen(place.theta)},
                                       Pack<T, 1>{widen(place.gradient)}, held, factors);
        if constexpr (kMomentum != Momentum::kNone) a.buffer[place.begin + e] = held.of[0];
      }
      tile.row(kRows - 1)[e] = u.of[0];
    }
    __syncthreads();
    sums.add(tile, rows, kRows - 1);
  };
  for_each_tile<kSlots<kRows>>(go ? table.first_chunk[table.count] : 0, fill, work);
  sums.finish(a.partial, a.k);
}

}  // namespace lyapcuda::kernels
