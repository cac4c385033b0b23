// torch.ops.lyapcuda.descend_: the quasi-Newton step θ ← θ − (gain/h)·g, with h still on the
// device.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <limits>

#include "../exponent.h"
#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "descend.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

Tensor descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient, Tensor state, double gain,
                double max_lr, double weight_decay) {
  check_vector(state, "state", kStateSize);
  check_like(gradient, "gradient", theta, "theta");
  STD_TORCH_CHECK(gain > 0.0 && std::isfinite(gain), "gain: expected a positive number, got ",
                  gain);
  STD_TORCH_CHECK(max_lr > 0.0 && std::isfinite(max_lr), "max_lr: expected a positive number, got ",
                  max_lr);
  for (size_t i = 0; i < theta.size(); ++i) {
    STD_TORCH_CHECK(theta[i].is_cpu() && theta[i].is_contiguous(), "theta[", i,
                    "]: expected a contiguous CPU tensor");
    STD_TORCH_CHECK(gradient[i].is_cpu() && gradient[i].is_contiguous(), "gradient[", i,
                    "]: expected a contiguous CPU tensor");
    const ScalarType dtype = theta[i].scalar_type();
    STD_TORCH_CHECK(is_buffer_dtype(dtype) || is_storage_dtype(dtype, ScalarType::Float), "theta[",
                    i, "]: dtype ", dtype_name(dtype),
                    " is not float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(dtype == theta[0].scalar_type(), "theta[", i, "]: dtype ", dtype_name(dtype),
                    " differs from theta[0]'s ", dtype_name(theta[0].scalar_type()));
  }

  const double* values = static_cast<const double*>(state.const_data_ptr());
  // A step that was not finite, or nothing measured yet: stay where we are.
  const bool go = values[k_accepted] != 0.0 && std::isfinite(values[k_h_ema]);
  const double lr = go ? learning_rate(values[k_h_ema], gain, max_lr) : 0.0;
  Tensor used = torch::stable::new_empty(state, {});
  *static_cast<double*>(used.mutable_data_ptr()) = lr;
  if (!go || theta.empty()) return used;

  const Blocks blocks(sizes_of(theta));
  const ScalarType dtype = theta[0].scalar_type();
  const ScalarType buffer = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  with_buffer_and_storage(buffer, dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto theta_data = data_of<P>(theta);
    const auto gradient_data = data_of<const P>(gradient);
    blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
      LYAPCUDA_DISPATCH(descend_block<T, P>)(
          theta_data[segment] + begin, gradient_data[segment] + begin, length, lr, weight_decay);
    });
  });
  return used;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("descend_", TORCH_BOX(&lyapcuda::cpu::descend_));
}
