// The slopes of a direction along the rows of a panel, on the CPU.
#pragma once

namespace lyapcuda::cpu {

template <class T, class P, Momentum kMomentum>
void slopes(const Launcher&, const SlopesCall& call) {
  const int64_t k = call.panel.size(0), length = call.panel.size(1);
  std::fill_n(call.out, k, 0.0);
  const Newton newton{read<double>(call.state), k, 1.0, 1.0};
  const int64_t rows = newton.has_vectors() ? k : 0;
  if (!newton.go(factor_of(read<double>(call.factor))) || (rows == 0 && !call.buffer)) return;
  const Blocks blocks(sizes_of(call.theta), kPanelBlock);
  const DirectionScalars scalars{call.options.weight_decay, call.options.momentum};
  std::vector<double> partial(std::max<int64_t>(blocks.runs(), 1) * k, 0.0);
  const auto theta = read<P>(call.theta), gradient = read<P>(call.gradient);
  T* const buffer = written<T>(call.buffer);
  const T* const panel = read<T>(call.panel);
  blocks.for_each_run(k + 1, [&](int64_t run, const auto& visit) {
    visit([&](int64_t segment, int64_t begin, int64_t n, int64_t) {
      const int64_t at = call.offsets[segment] + begin;
      const DirectionArguments<T, P> arguments{theta[segment] + begin, gradient[segment] + begin,
                                               buffer == nullptr ? nullptr : buffer + at};
      LYAPCUDA_DISPATCH(slopes_block<T, P, kMomentum>)(
          arguments, PanelRows<T>{panel + at, rows, length}, n, scalars, partial.data() + run * k);
    });
  });
  tree_sum(partial.data(), blocks.runs(), k);
  std::copy_n(partial.begin(), k, call.out);
}

}  // namespace lyapcuda::cpu
