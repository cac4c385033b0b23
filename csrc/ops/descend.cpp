// torch.ops.lyapcuda.descend_: the quasi-Newton step with one curvature, θ ← θ − (gain/h)·u, or
// with those along the rows of a panel; the curvatures are still on the device.
#ifdef LYAPCUDA_ELEMENT

// One curvature. The lists are θ and its gradient.
template <class T_, class P_, Momentum kMomentum>
struct Descend {
  using T = T_;
  using P = P_;
  using Arguments = DescendArguments<T>;
  static constexpr int kLists = 2;
  static constexpr bool kBuffer = kMomentum != Momentum::kNone;

  T *buffer, rate;
  DirectionFactors<T> factors;

  LYAPCUDA_INLINE explicit Descend(const Arguments& a)
      : buffer(a.buffer),
        rate(static_cast<T>(a.rate())),
        factors{static_cast<T>(a.weight_decay), static_cast<T>(a.momentum)} {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum*) const {
    using V = typename M::Value;
    V held{};
    const V theta = m.read(Listed<0>{}), gradient = m.read(Listed<1>{});
    if constexpr (kBuffer) held = m.read(buffer);
    const V u = direction<kMomentum, true>(theta, gradient, held, factors);
    m.write(Listed<0>{}, theta - u * rate);
    if constexpr (kBuffer) m.write(buffer, held);
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(Listed<0>{}) && is(Listed<1>{}) && (!kBuffer || is(buffer));
  }
};

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/newton_descend.inc"
#endif

#else

#include "op.h"

#include "step.h"

namespace lyapcuda {

template <class T>
struct DescendArguments : ElementwiseArguments {
  static constexpr int kBlocks = 5;

  T* buffer;                     // flat, where there is momentum
  const double *state, *factor;  // factor may be null
  double gain, max_lr, weight_decay, momentum;
  double* used;  // the learning rate taken

  LYAPCUDA_HOST_DEVICE double h() const { return state[state_offset(StateVector::h_ema, 1)]; }
  // A step that was not finite, or nothing measured yet: stay where we are.
  LYAPCUDA_HOST_DEVICE bool go() const {
    const double both[2] = {h(), factor_of(factor)};
    return state[state_offset(StateScalar::accepted)] != 0.0 && all_finite(both, 2);
  }
  LYAPCUDA_HOST_DEVICE double rate() const {
    return learning_rate(h(), gain * factor_of(factor), max_lr);
  }
  LYAPCUDA_HOST_DEVICE void note() const { *used = go() ? rate() : 0.0; }
};

struct NewtonDescendCall {
  std::vector<Tensor> theta, gradient;
  std::vector<int64_t> offsets;
  Tensor panel, state, slopes;
  StepOptions options;
  double gain, max_lr;
  std::optional<Tensor> buffer, factor;

  double* out;
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/descend.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/newton_descend.h"
#else
#include "../cpu/newton_descend.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor descend_(std::vector<Tensor> theta, std::vector<Tensor> gradient, Tensor state, double gain,
                double max_lr, double weight_decay, double momentum, bool nesterov,
                std::optional<Tensor> buffer, std::optional<std::vector<int64_t>> offsets,
                std::optional<Tensor> factor, std::optional<Tensor> panel,
                std::optional<Tensor> slopes) {
  const Device device = device_of(state, "state");
  const StepOptions options{weight_decay, momentum, nesterov};
  check_rate(gain, max_lr);
  check_both(panel, "panel", slopes, "slopes");
  if (panel) {
    STD_TORCH_CHECK(offsets.has_value(), "offsets: panel needs them");
    check_panel_step(theta, gradient, *offsets, *panel, state, options, buffer, factor, device);
    check_vector(*slopes, "slopes", panel->size(0), device);
  } else {
    check_parameters(theta, gradient, device);
    check_vector(state, "state", state_size(1), device);
    check_momentum(buffer, options);
    check_factor(factor, device);
    STD_TORCH_CHECK(buffer.has_value() == offsets.has_value(),
                    "buffer, offsets: give both or none");
    if (buffer) {
      check_buffer(*buffer, "buffer", device);
      check_segments(theta, "theta", *offsets, *buffer, device);
    }
  }

  const ScalarType unread = panel ? panel->scalar_type() : ScalarType::Float;
  const ScalarType dtype = theta.empty() ? unread : theta[0].scalar_type();
  const ScalarType arithmetic = panel ? panel->scalar_type() : buffer_dtype(dtype);
  const Tensor used = panel ? new_doubles(state, {panel->size(0) + 1}) : new_doubles(state, {});
  const std::vector<int64_t> places = offsets ? *offsets : std::vector<int64_t>{};
  const Launcher launcher(device, state);
  with_buffer_and_storage(arithmetic, dtype, [&](auto* buffers, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffers)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    with_momentum(momentum_kind(buffer.has_value(), nesterov), [&](auto kind) {
      constexpr Momentum kMomentum = decltype(kind)::value;
      if (panel) {
        newton_descend<T, P, kMomentum>(
            launcher, {theta, gradient, places, *panel, state, *slopes, options, gain, max_lr,
                       buffer, factor, written<double>(used)});
        return;
      }
      const DescendArguments<T> arguments{{},
                                          written<T>(buffer),
                                          read<double>(state),
                                          read<double>(factor),
                                          gain,
                                          max_lr,
                                          weight_decay,
                                          momentum,
                                          written<double>(used)};
      const auto lists = lists_of<P>(theta, places, written<P>(theta), read<P>(gradient));
      LYAPCUDA_ELEMENTWISE(launcher, "descend_", lists, arguments, nullptr,
                           Descend<T, P, kMomentum>);
    });
  });
  return used;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(descend_,
            "(Tensor(a!)[] theta, Tensor[] gradient, Tensor state, *, float gain=1., "
            "float max_lr=10., float weight_decay=0., float momentum=0., bool nesterov=False, "
            "Tensor(b!)? buffer=None, int[]? offsets=None, Tensor? factor=None, "
            "Tensor? panel=None, Tensor? slopes=None) -> Tensor")

#endif
