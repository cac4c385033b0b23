// ascent_ for k > 1 on the CPU.
#pragma once

namespace lyapcuda::cpu {

template <class T, class P, bool kRealised, bool kMomentum, bool kMetric>
void panel_ascent(const Launcher&, const PanelAscentCall& call) {
  const int64_t k = call.q.size(0), row = call.q.size(1), stacked = (2 + kRealised + kMomentum) * k;
  const double* const state = read<double>(call.state);
  const PanelAscentScalars scalars{call.sign * state[state_offset(StateScalar::beta)],
                                   call.weight_decay, call.momentum,
                                   state + state_offset(StateVector::displacement, k)};
  const Blocks blocks(sizes_of(call.g0), kPanelBlock);
  const auto g0 = read<P>(call.g0), theta = read<P>(call.theta);
  T* const d = written<T>(call.d);
  const T* const q = read<T>(call.q);
  const P* const g1 = read<P>(call.g1);
  const T* const p = read<T>(call.p);
  T* const p_next = written<T>(call.p_next);
  const T* const metric = read<T>(call.metric);
  std::vector<double> partial(std::max<int64_t>(blocks.runs(), 1) * stacked * stacked, 0.0);
  blocks.for_each_run(k, [&](int64_t run, const auto& visit) {
    Aligned<double> tile(stacked * kGramTile);
    double* const sums = partial.data() + run * stacked * stacked;
    visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
      const int64_t at = call.offsets[segment] + begin;
      const PanelAscentArguments<T, P> arguments{d + at,
                                                 q + at,
                                                 g0[segment] + begin,
                                                 g1 + at,
                                                 kRealised ? theta[segment] + begin : nullptr,
                                                 kMomentum ? p + at : nullptr,
                                                 kMomentum ? p_next + at : nullptr,
                                                 kMetric ? metric + at : nullptr,
                                                 k,
                                                 row};
      LYAPCUDA_DISPATCH(panel_ascent_block<T, P, kRealised, kMomentum, kMetric>)
      (arguments, length, scalars, tile.data(), sums);
    });
  });
  tree_sum(partial.data(), blocks.runs(), stacked * stacked);
  mirror(partial.data(), stacked);
  refuse_overflow(partial.data(), static_cast<int>(k), kRealised, kMomentum, scalars.rate,
                  largest_of<T>());
  std::copy_n(partial.begin(), stacked * stacked, call.out);
}

}  // namespace lyapcuda::cpu
