// recenter_ for k > 1 on the CPU.
#pragma once

#include "combine.h"

namespace lyapcuda::cpu {

template <class T, class P, bool kMetric>
void panel_recenter(const Launcher&, const PanelRecenterCall& call) {
  const int64_t k = call.q.size(0), row = call.q.size(1);
  const double* const state = read<double>(call.state);
  const bool pending = state[state_offset(StateScalar::pending)] != 0.0;
  const double* const transform = state + state_offset(StateMatrix::transform, k);
  const double* const displacement = state + state_offset(StateVector::displacement, k);
  const std::vector<T> coefficients(transform, transform + k * k);
  const Blocks blocks(sizes_of(call.theta), kPanelBlock);
  const auto theta = read<P>(call.theta);
  T* const q = written<T>(call.q);
  P* const copies = written<P>(call.copies);
  const T* const d = read<T>(call.d);
  const T* const metric = read<T>(call.metric);
  blocks.for_each_run(k, [&](int64_t, const auto& visit) {
    Aligned<T> tile(k * combine_tile(k));
    visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
      const int64_t at = call.offsets[segment] + begin;
      const PanelRecenterArguments<T, P> arguments{{q + at, d + at, coefficients.data(), k, k, row},
                                                   copies + at,
                                                   theta[segment] + begin,
                                                   kMetric ? metric + at : nullptr,
                                                   displacement,
                                                   pending};
      LYAPCUDA_DISPATCH(panel_recenter_block<T, P, kMetric>)(arguments, length, tile.data());
    });
  });
}

// p ← p_next·transform where that is pending.
template <class T>
void panel_recenter_momentum(const Launcher& launcher, const Tensor& p, const Tensor& p_next,
                             const Tensor& state) {
  const double* const values = read<double>(state);
  if (values[state_offset(StateScalar::pending)] == 0.0) return;
  combine<T>(launcher, p, p_next, values + state_offset(StateMatrix::transform, p.size(0)),
             nullptr);
}

}  // namespace lyapcuda::cpu
