// torch.ops.lyapcuda.panel_ascent_ on CUDA: kernels/panel_ascent.cuh.
#include "../kernels/panel_ascent.cuh"

#include "gram.h"

namespace lyapcuda::cuda {
namespace {

struct PanelAscentCall {
  Tensor d, q, g1, state, out;
  std::vector<Tensor> g0, theta;  // θ: empty where nothing is realised
  std::vector<int64_t> offsets;
  std::optional<Tensor> p, p_next;
  double sign, weight_decay, momentum;
  bool realised;
};

template <class T, class P, bool kRealised, bool kMomentum, int kRows>
void panel_ascent_typed(const Launcher& launcher, const PanelAscentCall& call) {
  const int k = static_cast<int>(call.q.size(0)), rows = (2 + kRealised + kMomentum) * k;
  const int pairs = kernels::symmetric_pairs(rows);
  constexpr int kHeld = kernels::kPanelBlocks<T, kRealised, kMomentum, kRows>;
  const auto g0 = data_of<const P>(call.g0);
  // θ's column of the table is not read where it isn't given.
  const auto theta = kRealised ? data_of<const P>(call.theta) : g0;
  const P* const* const lists[2] = {g0.data(), theta.data()};
  const auto sizes = sizes_of(call.g0);
  const Tensor partial = torch::stable::new_empty(
      call.state, {most_blocks(launcher, sizes.size(), kHeld), kernels::gram_row(pairs)});
  const double* const beta = read<double>(call.state) + panel_offset(PanelScalar::beta);
  double* const first = written<double>(partial);
  int64_t count = 0;
  kernels::PanelAscentArguments<T, P> arguments{written<T>(call.d),
                                                read<T>(call.q),
                                                read<P>(call.g1),
                                                kMomentum ? read<T>(*call.p) : nullptr,
                                                kMomentum ? written<T>(*call.p_next) : nullptr,
                                                call.q.size(1),
                                                k,
                                                beta,
                                                call.sign,
                                                static_cast<T>(call.weight_decay),
                                                static_cast<T>(call.momentum),
                                                nullptr};
  kernels::for_each_table(
      lists, sizes.data(), call.offsets.data(), static_cast<int64_t>(sizes.size()),
      [&](const kernels::PanelAscentSegments<P>& table) {
        const int64_t blocks = blocks_for(launcher, chunks_of(table), kHeld);
        arguments.partial = first + count * kernels::gram_row(pairs);
        launcher.run("panel_ascent_", kernels::panel_ascent<T, P, kRealised, kMomentum, kRows>,
                     blocks, kernels::panel_threads(kRows), table, arguments);
        count += blocks;
      },
      kernels::kPanelLength<T, kRows>);
  double* const out = written<double>(call.out);
  finish_gram(launcher, "panel_ascent_", first, count, {rows, rows, true}, out, nullptr);
  launcher.run("panel_ascent_", kernels::panel_ascent_check<T>, 1, 32, out, k, kRealised, kMomentum,
               beta, call.sign);
}

// Steps, and writes the Gram matrix to call.out.
template <class T, class P>
void panel_ascent_of(const Launcher& launcher, const PanelAscentCall& call) {
  with_flags(call.realised, call.p.has_value(), [&](auto realised, auto heavy) {
    constexpr bool kRealised = decltype(realised)::value, kMomentum = decltype(heavy)::value;
    const int64_t rows = (2 + kRealised + kMomentum) * call.q.size(0);
    const auto step = [&](auto most) {
      panel_ascent_typed<T, P, kRealised, kMomentum, most()>(launcher, call);
    };
    if constexpr (kRealised || kMomentum) {
      kernels::with_rows<16, 32, 64, 128>(rows, step);
    } else {
      kernels::with_rows<16, 32, 64>(rows, step);  // those of 32 separations
    }
  });
}

Tensor panel_ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, Tensor g1,
                     std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
                     std::optional<std::vector<Tensor>> theta, double momentum,
                     std::optional<Tensor> p, std::optional<Tensor> p_next) {
  const Device device = device_of(q, "q");
  check_panel(q, "q", kMaxPanel, device);
  check_same_panel(d, "d", q, "q", device);
  check_segments(g0, "g0", offsets, q, device);
  check_storage_panel(g1, "g1", q, "q", g0, "g0", device);
  check_vector(state, "state", panel_size(q.size(0)), device);
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
  check_over(d, "d", q, "q");
  check_over(d, "d", g1, "g1");

  const Launcher launcher(device);
  const int64_t stacked = (2 + theta.has_value() + p.has_value()) * q.size(0);
  const Tensor out = torch::stable::new_empty(state, {stacked, stacked});
  const PanelAscentCall call{d,
                             q,
                             g1,
                             state,
                             out,
                             g0,
                             theta ? *theta : std::vector<Tensor>{},
                             offsets,
                             p,
                             p_next,
                             static_cast<double>(sign),
                             weight_decay,
                             momentum,
                             theta.has_value()};
  with_buffer_and_storage(q.scalar_type(), g1.scalar_type(), [&](auto* buffer, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    panel_ascent_of<T, P>(launcher, call);
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("panel_ascent_", TORCH_BOX(&lyapcuda::cuda::panel_ascent_));
}
