// The quasi-Newton step with k curvatures on the CPU.
#pragma once

namespace lyapcuda::cpu {

template <class T, class P, Momentum kMomentum>
void newton_descend(const Launcher&, const NewtonDescendCall& call) {
  const int64_t k = call.panel.size(0), length = call.panel.size(1);
  double* const rates = call.out;
  std::fill_n(rates, k + 1, 0.0);
  const double times = factor_of(read<double>(call.factor));
  const double* const slopes = read<double>(call.slopes);
  const Newton newton{read<double>(call.state), k, call.gain * times, call.max_lr};
  if (!newton.go(times) || !all_finite(slopes, k)) return;
  for (int64_t j = 0; j <= k; ++j) rates[j] = newton.rate(j);

  const int64_t rows = newton.has_vectors() ? k : 0;
  std::vector<double> along(k, 0.0);
  for (int64_t j = 0; j < rows; ++j) along[j] = newton.along(slopes, j);
  std::vector<T> weights(k, T(0));
  for (int64_t i = 0; i < rows; ++i) weights[i] = static_cast<T>(newton.weight(along.data(), i));
  const Blocks blocks(sizes_of(call.theta), kPanelBlock);
  const DirectionScalars scalars{call.options.weight_decay, call.options.momentum};
  const auto theta = written<P>(call.theta), gradient = read<P>(call.gradient);
  // Only read: it took the gradient in when the slopes were measured.
  const T* const buffer = read<T>(call.buffer);
  const T* const panel = read<T>(call.panel);
  blocks.for_each_run(k + 1, [&](int64_t, const auto& visit) {
    visit([&](int64_t segment, int64_t begin, int64_t n, int64_t) {
      const int64_t at = call.offsets[segment] + begin;
      const DirectionArguments<T, P> arguments{
          theta[segment] + begin, gradient[segment] + begin,
          buffer == nullptr ? nullptr : const_cast<T*>(buffer + at)};
      LYAPCUDA_DISPATCH(newton_descend_block<T, P, kMomentum>)(
          arguments, PanelRows<T>{panel + at, rows, length}, weights.data(), n, rates[k], scalars);
    });
  });
}

}  // namespace lyapcuda::cpu
