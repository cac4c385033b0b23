// torch.ops.lyapcuda.descend_: the quasi-Newton step θ ← θ − (gain/h)·u, with h still on the
// device.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <limits>

#include "../direction.h"
#include "blocks.h"
#include "direction.h"
#include "tensors.h"

#define LYAPCUDA_BODY "descend.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

Tensor descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient, Tensor state, double gain,
                double max_lr, double weight_decay, double momentum, bool nesterov,
                std::optional<Tensor> buffer, std::optional<std::vector<int64_t>> offsets,
                std::optional<Tensor> factor) {
  const Device device(DeviceType::CPU);
  const StepOptions options{weight_decay, momentum, nesterov};
  check_vector(state, "state", kStateSize);
  check_parameters(theta, gradient, device);
  check_rate(gain, max_lr);
  check_momentum(buffer, options);
  check_factor(factor, device);
  STD_TORCH_CHECK(buffer.has_value() == offsets.has_value(), "buffer, offsets: give both or none");
  if (buffer) {
    check_buffer(*buffer, "buffer");
    check_segments(theta, "theta", *offsets, *buffer);
  }

  const double* values = static_cast<const double*>(state.const_data_ptr());
  const double times =
      factor_of(factor ? static_cast<const double*>(factor->const_data_ptr()) : nullptr);
  // A step that was not finite, or nothing measured yet: stay where we are.
  const bool go =
      values[k_accepted] != 0.0 && std::isfinite(values[k_h_ema]) && std::isfinite(times);
  const double lr = go ? learning_rate(values[k_h_ema], gain * times, max_lr) : 0.0;
  Tensor used = torch::stable::new_empty(state, {});
  *static_cast<double*>(used.mutable_data_ptr()) = lr;
  if (!go || theta.empty()) return used;

  const Blocks blocks(sizes_of(theta));
  const ScalarType dtype = theta[0].scalar_type();
  const DirectionScalars scalars{weight_decay, momentum};
  with_buffer_and_storage(buffer_dtype(dtype), dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto theta_data = data_of<P>(theta);
    const auto gradient_data = data_of<const P>(gradient);
    T* const buffer_data = buffer ? static_cast<T*>(buffer->mutable_data_ptr()) : nullptr;
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
        const DirectionArguments<T, P> arguments{
            theta_data[segment] + begin, gradient_data[segment] + begin,
            buffer ? buffer_data + (*offsets)[segment] + begin : nullptr};
        LYAPCUDA_DISPATCH(descend_block<T, P, kind()>)(arguments, length, lr, scalars);
      });
    });
  });
  return used;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("descend_", TORCH_BOX(&lyapcuda::cpu::descend_));
}
