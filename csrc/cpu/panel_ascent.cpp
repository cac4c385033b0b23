// torch.ops.lyapcuda.panel_ascent_: the step of k copies, seen from their separations, in one pass
// that also leaves the Gram matrix of everything benettin_ asks about.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <limits>

#include "../stacked_gram.h"
#include "blocks.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "panel_ascent.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

struct PanelAscentTensors {
  Tensor d, q, g1;
  std::vector<Tensor> g0, theta;
  std::vector<int64_t> offsets;
  std::optional<Tensor> p, p_next;
};

template <class T, class P, bool kRealised, bool kMomentum>
void panel_ascent_typed(const PanelAscentTensors& t, const PanelAscentScalars& scalars,
                        double* out) {
  const int64_t k = t.q.size(0), row = t.q.size(1), stacked = (2 + kRealised + kMomentum) * k;
  const Blocks blocks(sizes_of(t.g0), kPanelBlock);
  const auto g0 = data_of<const P>(t.g0), theta = data_of<const P>(t.theta);
  T* const d = static_cast<T*>(t.d.mutable_data_ptr());
  const T* const q = static_cast<const T*>(t.q.const_data_ptr());
  const P* const g1 = static_cast<const P*>(t.g1.const_data_ptr());
  const T* const p = kMomentum ? static_cast<const T*>(t.p->const_data_ptr()) : nullptr;
  T* const p_next = kMomentum ? static_cast<T*>(t.p_next->mutable_data_ptr()) : nullptr;
  std::vector<double> partial(std::max<int64_t>(blocks.runs(), 1) * stacked * stacked, 0.0);
  blocks.for_each_run(k, [&](int64_t run, const auto& visit) {
    Aligned<double> tile(stacked * kGramTile);
    double* const sums = partial.data() + run * stacked * stacked;
    visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
      const int64_t at = t.offsets[segment] + begin;
      const PanelAscentArguments<T, P> arguments{d + at,
                                                 q + at,
                                                 g0[segment] + begin,
                                                 g1 + at,
                                                 kRealised ? theta[segment] + begin : nullptr,
                                                 kMomentum ? p + at : nullptr,
                                                 kMomentum ? p_next + at : nullptr,
                                                 k,
                                                 row};
      LYAPCUDA_DISPATCH(panel_ascent_block<T, P, kRealised, kMomentum>)
      (arguments, length, scalars, tile.data(), sums);
    });
  });
  tree_sum(partial.data(), blocks.runs(), stacked * stacked);
  mirror(partial.data(), stacked);
  refuse_overflow(partial.data(), static_cast<int>(k), kRealised, kMomentum, scalars.rate,
                  std::numeric_limits<T>::max());
  std::copy_n(partial.begin(), stacked * stacked, out);
}

Tensor panel_ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, Tensor g1,
                     std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
                     std::optional<std::vector<Tensor>> theta, double momentum,
                     std::optional<Tensor> p, std::optional<Tensor> p_next) {
  check_panel(q, "q", kMaxPanel);
  check_same_panel(d, "d", q, "q");
  check_segments(g0, "g0", offsets, q);
  check_storage_panel(g1, "g1", q, "q", g0, "g0");
  check_vector(state, "state", panel_size(q.size(0)));
  check_sign(sign);
  check_both(p, "p", p_next, "p_next");
  STD_TORCH_CHECK(p.has_value() || momentum == 0.0, "momentum: ", momentum, " needs p and p_next");
  if (theta) {
    check_like(*theta, "theta", g0, "g0");
    check_segments(*theta, "theta", offsets, q);
  }
  if (p) {
    check_same_panel(*p, "p", q, "q");
    check_same_panel(*p_next, "p_next", q, "q");
    check_over(*p_next, "p_next", *p, "p");
    check_over(d, "d", *p, "p");
  }
  check_over(d, "d", q, "q");
  check_over(d, "d", g1, "g1");

  const double* values = static_cast<const double*>(state.const_data_ptr());
  const PanelAscentScalars scalars{
      static_cast<double>(sign) * values[panel_offset(PanelScalar::beta)], weight_decay, momentum};
  const int64_t stacked = (2 + theta.has_value() + p.has_value()) * q.size(0);
  Tensor sums = torch::stable::new_empty(state, {stacked, stacked});
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(out, stacked * stacked, 0.0);
  if (g0.empty()) return sums;
  const PanelAscentTensors tensors{d,       q, g1,    g0, theta ? *theta : std::vector<Tensor>{},
                                   offsets, p, p_next};
  with_buffer_and_storage(q.scalar_type(), g0[0].scalar_type(), [&](auto* buffer, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto run = [&](auto realised, auto heavy) {
      panel_ascent_typed<T, P, decltype(realised)::value, decltype(heavy)::value>(tensors, scalars,
                                                                                  out);
    };
    if (theta) {
      p ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
    } else {
      p ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
    }
  });
  return sums;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("panel_ascent_", TORCH_BOX(&lyapcuda::cpu::panel_ascent_));
}
