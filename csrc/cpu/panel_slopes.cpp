// torch.ops.lyapcuda.panel_slopes_: the slopes of the direction of a step along the rows of a
// panel.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../direction.h"
#include "blocks.h"
#include "direction.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "panel_slopes.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

Tensor panel_slopes_(std::vector<Tensor> theta, std::vector<Tensor> gradient,
                     std::vector<int64_t> offsets, Tensor panel, Tensor state, double weight_decay,
                     double momentum, bool nesterov, std::optional<Tensor> buffer,
                     std::optional<Tensor> factor) {
  const Device device(DeviceType::CPU);
  const int64_t k = check_panel_step(theta, gradient, offsets, panel, state,
                                     {weight_decay, momentum, nesterov}, buffer, factor, device);

  Tensor out = torch::stable::new_empty(state, {k});
  double* const slopes = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(slopes, k, 0.0);
  const Newton newton{static_cast<const double*>(state.const_data_ptr()), k, 1.0, 1.0};
  const double times =
      factor_of(factor ? static_cast<const double*>(factor->const_data_ptr()) : nullptr);
  const int64_t rows = newton.has_vectors() ? k : 0;
  if (!newton.go(times) || theta.empty() || (rows == 0 && !buffer)) return out;

  const Blocks blocks(sizes_of(theta), kPanelBlock);
  const DirectionScalars scalars{weight_decay, momentum};
  std::vector<double> partial(std::max<int64_t>(blocks.runs(), 1) * k, 0.0);
  with_buffer_and_storage(
      panel.scalar_type(), theta[0].scalar_type(), [&](auto* arithmetic, auto* storage) {
        using T = std::remove_pointer_t<decltype(arithmetic)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        // Only read here; a direction that is taken is written to as well.
        const auto theta_data = data_of<const P>(theta), gradient_data = data_of<const P>(gradient);
        T* const buffer_data = buffer ? static_cast<T*>(buffer->mutable_data_ptr()) : nullptr;
        const T* const panel_data = static_cast<const T*>(panel.const_data_ptr());
        with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
          blocks.for_each_run(k + 1, [&](int64_t run, const auto& visit) {
            visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
              const int64_t at = offsets[segment] + begin;
              const DirectionArguments<T, P> arguments{const_cast<P*>(theta_data[segment] + begin),
                                                       gradient_data[segment] + begin,
                                                       buffer ? buffer_data + at : nullptr};
              LYAPCUDA_DISPATCH(panel_slopes_block<T, P, kind()>)(
                  arguments, PanelRows<T>{panel_data + at, rows, panel.size(1)}, length, scalars,
                  partial.data() + run * k);
            });
          });
        });
      });
  tree_sum(partial.data(), blocks.runs(), k);
  if (blocks.runs() > 0) std::copy_n(partial.begin(), k, slopes);
  return out;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("panel_slopes_", TORCH_BOX(&lyapcuda::cpu::panel_slopes_));
}
