// ascent_ for k > 1 on CUDA.
#pragma once

#include "../kernels/panel_ascent.cuh"
#include "gram.h"

namespace lyapcuda::cuda {

template <class T, class P, bool kRealised, bool kMomentum, bool kMetric, int kRows>
void panel_ascent_of(const Launcher& launcher, const PanelAscentCall& call) {
  const int k = static_cast<int>(call.q.size(0)), rows = (2 + kRealised + kMomentum) * k;
  const int64_t width = kernels::gram_row(kernels::symmetric_pairs(rows));
  constexpr int kHeld = kernels::kPanelBlocks<T, kRealised, kMomentum, kMetric, kRows>;
  const auto g0 = read<P>(call.g0);
  // θ's list is not read where it isn't given.
  const auto lists = lists_of<P>(call.g0, call.offsets, g0, kRealised ? read<P>(call.theta) : g0);
  const Tensor partial = scratch_rows(launcher, lists.count(), kHeld, width);
  const double* const state = read<double>(call.state);
  const double* const beta = state + state_offset(StateScalar::beta);
  double* const first = written<double>(partial);
  kernels::PanelAscentArguments<T, P> arguments{written<T>(call.d),
                                                read<T>(call.q),
                                                read<P>(call.g1),
                                                read<T>(call.p),
                                                written<T>(call.p_next),
                                                read<T>(call.metric),
                                                call.q.size(1),
                                                k,
                                                beta,
                                                state + state_offset(StateVector::displacement, k),
                                                call.sign,
                                                static_cast<T>(call.weight_decay),
                                                static_cast<T>(call.momentum),
                                                nullptr};
  const int64_t count = for_each_launch(
      launcher, lists, kHeld,
      [&](const kernels::PanelAscentSegments<P>& table, int64_t blocks, int64_t before) {
        arguments.partial = first + before * width;
        launcher.run("ascent_", kernels::panel_ascent<T, P, kRealised, kMomentum, kMetric, kRows>,
                     blocks, kernels::panel_threads(kRows), table, arguments);
      },
      kernels::kPanelLength<T, kRows>);
  finish_gram(launcher, "ascent_", first, count, {rows, rows, true}, call.out, nullptr);
  launcher.run("ascent_", kernels::panel_ascent_check<T>, 1, 32, call.out, k, kRealised, kMomentum,
               beta, call.sign);
}

template <class T, class P, bool kRealised, bool kMomentum, bool kMetric>
void panel_ascent(const Launcher& launcher, const PanelAscentCall& call) {
  const int64_t rows = (2 + kRealised + kMomentum) * call.q.size(0);
  const auto step = [&](auto most) {
    panel_ascent_of<T, P, kRealised, kMomentum, kMetric, most()>(launcher, call);
  };
  if constexpr (kRealised || kMomentum) {
    kernels::with_rows<16, 32, 64, 128>(rows, step);
  } else {
    kernels::with_rows<16, 32, 64>(rows, step);  // those of 32 separations
  }
}

}  // namespace lyapcuda::cuda
