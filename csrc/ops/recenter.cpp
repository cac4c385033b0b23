// torch.ops.lyapcuda.recenter_: the next separations from what the step left, and the copies put
// back at their distance from the parameters.
#ifdef LYAPCUDA_ELEMENT

// One separation, transform·q. The list is θ.
template <class T_, class P_, bool kHeavy, bool kMetric>
struct Recenter {
  using T = T_;
  using P = P_;
  using Arguments = RecenterArguments<T, P, kHeavy>;
  static constexpr int kLists = 1;

  Arguments a;
  T scale, displacement;
  bool taken;  // the last step: q is the separation; else d is

  LYAPCUDA_INLINE explicit Recenter(const Arguments& arguments)
      : a(arguments),
        scale(static_cast<T>(a.scale())),
        displacement(static_cast<T>(a.displacement())),
        taken(a.pending()) {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum*) const {
    using V = typename M::Value;
    // copies may lie where d does: each element is read before it is written.
    const V q = m.read(taken ? static_cast<const T*>(a.q) : a.d);
    const V theta = m.read(Listed<0>{});
    if (!taken) m.write(a.q, q);
    V moved = q * scale;
    if constexpr (kMetric) moved = displaced(moved, m.read(a.metric), displacement);
    m.write_output(a.copies, theta + moved);
    if (kHeavy && !taken) m.write(a.p, m.read(a.p_next));
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(a.q) && is(a.d) && is(a.copies) && is(Listed<0>{}) &&
           (!kHeavy || (is(a.p) && is(a.p_next))) && (!kMetric || is(a.metric));
  }
};

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/panel_recenter.inc"
#endif

#else

#include "op.h"

namespace lyapcuda {

// Of one separation: flat buffers.
template <class T, class P, bool kHeavy>
struct RecenterArguments : ElementwiseArguments {
  static constexpr int kBlocks = 5;

  T* q;
  P* copies;
  const T* d;
  T* p;
  const T* p_next;
  const T* metric;
  const double* state;

  LYAPCUDA_HOST_DEVICE double scale() const {
    return state[state_offset(StateMatrix::transform, 1)];
  }
  LYAPCUDA_HOST_DEVICE double displacement() const {
    return state[state_offset(StateVector::displacement, 1)];
  }
  LYAPCUDA_HOST_DEVICE bool pending() const {
    return state[state_offset(StateScalar::pending)] != 0.0;
  }
  const void* output(int64_t at) const { return copies + at; }
};

// Of several: panels.
struct PanelRecenterCall {
  Tensor q, copies, d, state;
  std::vector<Tensor> theta;
  std::vector<int64_t> offsets;
  std::optional<Tensor> metric;
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/recenter.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/panel_recenter.h"
#else
#include "../cpu/panel_recenter.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

void recenter_(Tensor q, Tensor copies, Tensor d, std::vector<Tensor> theta,
               std::vector<int64_t> offsets, Tensor state, std::optional<Tensor> p,
               std::optional<Tensor> p_next, std::optional<Tensor> metric) {
  const Device device = device_of(q, "q");
  check_panel(q, "q", kMaxK, device);
  check_same_panel(d, "d", q, "q", device);
  check_segments(theta, "theta", offsets, q, device);
  check_storage_panel(copies, "copies", q, "q", theta, "theta", device);
  const int64_t k = q.size(0);
  check_vector(state, "state", state_size(k), device);
  STD_TORCH_CHECK(!overlap(q, d), "q: shares memory with d");
  STD_TORCH_CHECK(!overlap(q, copies), "q: shares memory with copies");
  check_over(copies, "copies", d, "d");
  check_both(p, "p", p_next, "p_next");
  if (p) {
    check_same_panel(*p, "p", q, "q", device);
    check_same_panel(*p_next, "p_next", q, "q", device);
    STD_TORCH_CHECK(!overlap(*p, *p_next), "p: shares memory with p_next");
  }
  check_metric(metric, p, q, device);
  STD_TORCH_CHECK(!metric || !overlap(q, *metric), "q: shares memory with metric");
  STD_TORCH_CHECK(!metric || !overlap(copies, *metric), "copies: shares memory with metric");
  if (theta.empty()) return;

  const Launcher launcher(device, state);
  with_buffer_and_storage(q.scalar_type(), copies.scalar_type(), [&](auto* buffer, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    if (k > 1) {
      with_flags(metric.has_value(), [&](auto metrical) {
        panel_recenter<T, P, decltype(metrical)::value>(
            launcher, {q, copies, d, state, theta, offsets, metric});
      });
      if (p) panel_recenter_momentum<T>(launcher, *p, *p_next, state);
      return;
    }
    with_one_flag(p.has_value(), metric.has_value(), [&](auto heavy, auto metrical) {
      constexpr bool kHeavy = decltype(heavy)::value, kMetric = decltype(metrical)::value;
      const RecenterArguments<T, P, kHeavy> arguments{{},
                                                      written<T>(q),
                                                      written<P>(copies),
                                                      read<T>(d),
                                                      written<T>(p),
                                                      read<T>(p_next),
                                                      read<T>(metric),
                                                      read<double>(state)};
      LYAPCUDA_ELEMENTWISE(launcher, "recenter_", lists_of<P>(theta, offsets, read<P>(theta)),
                           arguments, nullptr, Recenter<T, P, kHeavy, kMetric>);
    });
  });
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(recenter_,
            "(Tensor(a!) q, Tensor(b!) copies, Tensor d, Tensor[] theta, int[] offsets, "
            "Tensor state, *, Tensor(c!)? p=None, Tensor? p_next=None, Tensor? metric=None) -> ()")

#endif
