// torch.ops.lyapcuda.ascent_: the step of k copies, seen from their separations, in one pass that
// also leaves the Gram matrix of everything benettin_ asks about.
#ifdef LYAPCUDA_ELEMENT

// One separation. The lists are g0, and θ where it is given.
template <class T_, class P_, bool kRealised, bool kMomentum, bool kMetric>
struct Ascent {
  using T = T_;
  using P = P_;
  using Arguments = AscentArguments<T, P, kRealised, kMomentum>;
  static constexpr int kLists = 2;

  Arguments a;
  T scale;
  AscentFactors<T> factors;

  LYAPCUDA_INLINE explicit Ascent(const Arguments& arguments)
      : a(arguments),
        scale(static_cast<T>(a.scale())),
        factors{static_cast<T>(a.rate()), static_cast<T>(a.weight_decay),
                static_cast<T>(a.momentum), static_cast<T>(a.displacement()),
                T(1) / static_cast<T>(a.displacement())} {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum* sums) const {
    using V = typename M::Value;
    AscentStreams<V> of{m.read(Listed<0>{}), m.read(a.g1), {}, {}, {}};
    if constexpr (kRealised) of.theta = m.read(Listed<1>{});
    if constexpr (kMomentum) of.p = m.read(a.p) * scale;
    if constexpr (kMetric) of.metric = m.read(a.metric);
    const AscentValues<V> v =
        ascent_values<P, kRealised, kMomentum, kMetric>(m.read(a.q) * scale, of, factors);
    if constexpr (kMomentum) m.write(a.p_next, v.w);
    m.write_output(a.d, v.d);
    // The lower triangle of the Gram matrix of these rows.
    accumulate(sums[0], v.carried, v.carried);
    accumulate(sums[1], v.y, v.carried);
    accumulate(sums[2], v.y, v.y);
    if constexpr (kRealised) {
      accumulate(sums[3], v.moved, v.carried);
      accumulate(sums[4], v.moved, v.y);
      accumulate(sums[5], v.moved, v.moved);
    }
    if constexpr (kMomentum) {
      constexpr int kFirst = kRealised ? 6 : 3;
      accumulate(sums[kFirst], v.d, v.carried);
      accumulate(sums[kFirst + 1], v.d, v.y);
      if constexpr (kRealised) accumulate(sums[kFirst + 2], v.d, v.moved);
      accumulate(sums[Arguments::kSums - 1], v.d, v.d);
    }
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(a.d) && is(a.q) && is(a.g1) && is(Listed<0>{}) && (!kRealised || is(Listed<1>{})) &&
           (!kMomentum || (is(a.p) && is(a.p_next))) && (!kMetric || is(a.metric));
  }
};

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/panel_ascent.inc"
#endif

#else

#include "op.h"

#include "../scalars/stacked_gram.h"

namespace lyapcuda {

// Of one separation: flat buffers, and what is known on the device alone.
template <class T, class P, bool kRealised, bool kMomentum>
struct AscentArguments : ElementwiseArguments {
  static constexpr int kRows = 2 + kRealised + kMomentum;
  static constexpr int kSums = kRows * (kRows + 1) / 2;
  // At 64 registers a thread. With all streams and sums that would spill; a thread has seven loads
  // in flight then, so three do.
  static constexpr int kBlocks = kRealised && kMomentum ? 3 : 4;

  T* d;  // may be q, or lie where g1 does
  const T* q;
  const P* g1;
  const T* p;
  T* p_next;
  const T* metric;
  const double* state;
  double sign, weight_decay, momentum;

  LYAPCUDA_HOST_DEVICE double scale() const {
    return state[state_offset(StateMatrix::transform, 1)];
  }
  LYAPCUDA_HOST_DEVICE double displacement() const {
    return state[state_offset(StateVector::displacement, 1)];
  }
  LYAPCUDA_HOST_DEVICE double rate() const { return sign * state[state_offset(StateScalar::beta)]; }

  const void* output(int64_t at) const { return d == q ? nullptr : d + at; }

  // From the lower triangle to the matrix.
  LYAPCUDA_HOST_DEVICE void finish(const double* sums, double* out) const {
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j <= i; ++j) {
        out[i * kRows + j] = out[j * kRows + i] = sums[i * (i + 1) / 2 + j];
      }
    }
    refuse_overflow(out, 1, kRealised, kMomentum, rate(), largest_of<T>());
  }
};

// Of several: panels.
struct PanelAscentCall {
  Tensor d, q, g1, state;
  std::vector<Tensor> g0, theta;  // θ: empty where nothing is realised
  std::vector<int64_t> offsets;
  std::optional<Tensor> p, p_next, metric;
  double sign, weight_decay, momentum;

  double* out;
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/ascent.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/panel_ascent.h"
#else
#include "../cpu/panel_ascent.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, Tensor g1, std::vector<int64_t> offsets,
               Tensor state, int64_t sign, double weight_decay,
               std::optional<std::vector<Tensor>> theta, double momentum, std::optional<Tensor> p,
               std::optional<Tensor> p_next, std::optional<Tensor> metric) {
  const Device device = device_of(q, "q");
  check_panel(q, "q", kMaxK, device);
  check_same_panel(d, "d", q, "q", device);
  check_segments(g0, "g0", offsets, q, device);
  check_storage_panel(g1, "g1", q, "q", g0, "g0", device);
  const int64_t k = q.size(0);
  check_vector(state, "state", state_size(k), device);
  check_sign(sign);
  check_both(p, "p", p_next, "p_next");
  STD_TORCH_CHECK(p.has_value() || momentum == 0.0, "momentum: ", momentum, " needs p and p_next");
  if (theta) {
    check_like(*theta, "theta", g0, "g0");
    check_segments(*theta, "theta", offsets, q, device);
  }
  if (p) {
    check_same_panel(*p, "p", q, "q", device);
    check_same_panel(*p_next, "p_next", q, "q", device);
    check_over(*p_next, "p_next", *p, "p");
    check_over(d, "d", *p, "p");
  }
  check_metric(metric, p, q, device);
  STD_TORCH_CHECK(!metric || !overlap(d, *metric), "d: shares memory with metric");
  check_over(d, "d", q, "q");
  check_over(d, "d", g1, "g1");

  const int64_t stacked = (2 + theta.has_value() + p.has_value()) * k;
  const Tensor gram = new_doubles(state, {stacked, stacked});
  double* const out = written<double>(gram);
  const Launcher launcher(device, state);
  with_buffer_and_storage(q.scalar_type(), g1.scalar_type(), [&](auto* buffer, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto step = [&](auto realised, auto heavy, auto metrical) {
      constexpr bool kRealised = decltype(realised)::value, kMomentum = decltype(heavy)::value,
                     kMetric = decltype(metrical)::value;
      if (k > 1) {
        panel_ascent<T, P, kRealised, kMomentum, kMetric>(
            launcher, {d, q, g1, state, g0, theta ? *theta : std::vector<Tensor>{}, offsets, p,
                       p_next, metric, static_cast<double>(sign), weight_decay, momentum, out});
        return;
      }
      const AscentArguments<T, P, kRealised, kMomentum> arguments{{},
                                                                  written<T>(d),
                                                                  read<T>(q),
                                                                  read<P>(g1),
                                                                  read<T>(p),
                                                                  written<T>(p_next),
                                                                  read<T>(metric),
                                                                  read<double>(state),
                                                                  static_cast<double>(sign),
                                                                  weight_decay,
                                                                  momentum};
      // θ's list is not read where it isn't given.
      const auto lists = lists_of<P>(g0, offsets, read<P>(g0), read<P>(theta ? *theta : g0));
      LYAPCUDA_ELEMENTWISE(launcher, "ascent_", lists, arguments, out,
                           Ascent<T, P, kRealised, kMomentum, kMetric>);
    };
    with_flags(theta.has_value(), [&](auto realised) {
      with_one_flag(p.has_value(), metric.has_value(),
                    [&](auto heavy, auto metrical) { step(realised, heavy, metrical); });
    });
  });
  return gram;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(ascent_,
            "(Tensor(a!) d, Tensor q, Tensor[] g0, Tensor g1, int[] offsets, Tensor state, *, "
            "int sign=1, float weight_decay=0., Tensor[]? theta=None, float momentum=0., "
            "Tensor? p=None, Tensor(b!)? p_next=None, Tensor? metric=None) -> Tensor")

#endif
