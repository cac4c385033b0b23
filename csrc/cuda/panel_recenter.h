// recenter_ for k > 1 on CUDA: kernels/panel_recenter.cuh.
#pragma once

#include "../kernels/panel_recenter.cuh"
#include "combine.h"

namespace lyapcuda::cuda {

template <class T, class P, bool kMetric>
void panel_recenter(const Launcher& launcher, const PanelRecenterCall& call) {
  const int64_t k = call.q.size(0);
  const double* const state = read<double>(call.state);
  const kernels::PanelRecenterArguments<T, P> arguments{
      written<T>(call.q),
      written<P>(call.copies),
      read<T>(call.d),
      read<T>(call.metric),
      call.q.size(1),
      static_cast<int>(k),
      state + state_offset(StateMatrix::transform, k),
      state + state_offset(StateScalar::pending),
      state + state_offset(StateVector::displacement, k)};
  const auto lists = lists_of<P>(call.theta, call.offsets, read<P>(call.theta));
  constexpr int kHeld = kernels::kRecenterBlocks<T, P, kMetric>;
  kernels::with_rows<8, 16, 32>(k, [&](auto most) {
    for_each_launch(
        launcher, lists, kHeld,
        [&](const kernels::PanelRecenterSegments<P>& table, int64_t blocks, int64_t) {
          launcher.run("recenter_", kernels::panel_recenter<T, P, kMetric, most()>, blocks,
                       kernels::kThreads, table, arguments);
        },
        kernels::kTransformLength<T, most()>);
  });
}

// p ← p_next·transform where that is pending.
template <class T>
void panel_recenter_momentum(const Launcher& launcher, const Tensor& p, const Tensor& p_next,
                             const Tensor& state) {
  const double* const values = read<double>(state);
  combine<T>(launcher, p, p_next, values + state_offset(StateMatrix::transform, p.size(0)),
             values + state_offset(StateScalar::pending));
}

}  // namespace lyapcuda::cuda
