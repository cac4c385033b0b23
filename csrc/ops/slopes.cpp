// torch.ops.lyapcuda.slopes_: the slopes of a step's direction along the rows of a panel.
#ifdef LYAPCUDA_ELEMENT

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/slopes.inc"
#endif

#else

#include "op.h"

#include "step.h"

namespace lyapcuda {

struct SlopesCall {
  std::vector<Tensor> theta, gradient;
  std::vector<int64_t> offsets;
  Tensor panel, state;
  StepOptions options;
  std::optional<Tensor> buffer, factor;

  double* out;
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/slopes.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/slopes.h"
#else
#include "../cpu/slopes.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor slopes_(std::vector<Tensor> theta, std::vector<Tensor> gradient,
               std::vector<int64_t> offsets, Tensor panel, Tensor state, double weight_decay,
               double momentum, bool nesterov, std::optional<Tensor> buffer,
               std::optional<Tensor> factor) {
  const Device device = device_of(panel, "panel");
  const StepOptions options{weight_decay, momentum, nesterov};
  check_panel_step(theta, gradient, offsets, panel, state, options, buffer, factor, device);
  const Tensor out = new_doubles(state, {panel.size(0)});
  const Launcher launcher(device, state);
  const ScalarType dtype = theta.empty() ? panel.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(panel.scalar_type(), dtype, [&](auto* arithmetic, auto* storage) {
    using T = std::remove_pointer_t<decltype(arithmetic)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      slopes<T, P, decltype(kind)::value>(
          launcher,
          {theta, gradient, offsets, panel, state, options, buffer, factor, written<double>(out)});
    });
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(slopes_,
            "(Tensor[] theta, Tensor[] gradient, int[] offsets, Tensor panel, Tensor state, *, "
            "float weight_decay=0., float momentum=0., bool nesterov=False, "
            "Tensor(a!)? buffer=None, Tensor? factor=None) -> Tensor")

#endif
