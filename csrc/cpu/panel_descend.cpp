// torch.ops.lyapcuda.panel_descend_: the quasi-Newton step with k curvatures.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../direction.h"
#include "blocks.h"
#include "direction.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "panel_descend.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

Tensor panel_descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient,
                      std::vector<int64_t> offsets, Tensor panel, Tensor state, Tensor slopes,
                      double gain, double max_lr, double weight_decay, double momentum,
                      bool nesterov, std::optional<Tensor> buffer, std::optional<Tensor> factor) {
  const Device device(DeviceType::CPU);
  const int64_t k = check_panel_step(theta, gradient, offsets, panel, state,
                                     {weight_decay, momentum, nesterov}, buffer, factor, device);
  check_vector(slopes, "slopes", k);
  check_rate(gain, max_lr);

  Tensor out = torch::stable::new_empty(state, {k + 1});
  double* const rates = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(rates, k + 1, 0.0);
  const double times =
      factor_of(factor ? static_cast<const double*>(factor->const_data_ptr()) : nullptr);
  const Newton newton{static_cast<const double*>(state.const_data_ptr()), k, gain * times, max_lr};
  const double* const found = static_cast<const double*>(slopes.const_data_ptr());
  if (!newton.go(times) || !all_finite(found, k)) return out;
  for (int64_t j = 0; j <= k; ++j) rates[j] = newton.rate(j);
  if (theta.empty()) return out;

  const int64_t rows = newton.has_vectors() ? k : 0;
  std::vector<double> along(k, 0.0);
  for (int64_t j = 0; j < rows; ++j) along[j] = newton.along(found, j);
  const Blocks blocks(sizes_of(theta), kPanelBlock);
  const DirectionScalars scalars{weight_decay, momentum};
  with_buffer_and_storage(
      panel.scalar_type(), theta[0].scalar_type(), [&](auto* arithmetic, auto* storage) {
        using T = std::remove_pointer_t<decltype(arithmetic)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        std::vector<T> weights(k, T(0));
        for (int64_t i = 0; i < rows; ++i)
          weights[i] = static_cast<T>(newton.weight(along.data(), i));
        const auto theta_data = data_of<P>(theta);
        const auto gradient_data = data_of<const P>(gradient);
        // Only read: it took the gradient in when the slopes were measured.
        const T* const buffer_data =
            buffer ? static_cast<const T*>(buffer->const_data_ptr()) : nullptr;
        const T* const panel_data = static_cast<const T*>(panel.const_data_ptr());
        with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
          blocks.for_each_run(k + 1, [&](int64_t, const auto& visit) {
            visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
              const int64_t at = offsets[segment] + begin;
              const DirectionArguments<T, P> arguments{
                  theta_data[segment] + begin, gradient_data[segment] + begin,
                  buffer ? const_cast<T*>(buffer_data + at) : nullptr};
              LYAPCUDA_DISPATCH(panel_descend_block<T, P, kind()>)(
                  arguments, PanelRows<T>{panel_data + at, rows, panel.size(1)}, weights.data(),
                  length, rates[k], scalars);
            });
          });
        });
      });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("panel_descend_", TORCH_BOX(&lyapcuda::cpu::panel_descend_));
}
