// torch.ops.lyapcuda.ascent_ on CUDA: kernels/ascent.cuh.
#include "../kernels/ascent.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

// Every table of segments is a launch, whose blocks leave a row of sums each; one block adds them.
template <class T, class P, bool kRealised, bool kMomentum>
void ascent_typed(const Launcher& launcher, const std::vector<Tensor>& g0,
                  const std::vector<Tensor>& g1, const std::vector<int64_t>& offsets,
                  const std::vector<Tensor>& theta, const Tensor& state,
                  kernels::AscentArguments<T> arguments, double* sums) {
  const auto g0_data = data_of<const P>(g0), g1_data = data_of<const P>(g1);
  // θ's column of the table is not read where it isn't given.
  const auto theta_data = kRealised ? data_of<const P>(theta) : g0_data;
  const auto sizes = sizes_of(g0);
  const P* const* const lists[3] = {g0_data.data(), g1_data.data(), theta_data.data()};
  const int held = kernels::kAscentBlocks<P, kRealised, kMomentum>;

  const Tensor rows = torch::stable::new_empty(
      state, {most_blocks(launcher, sizes.size(), held), int64_t{kSumSize}});
  double* const first_row = written<double>(rows);
  int64_t count = 0;
  kernels::for_each_table(lists, sizes.data(), offsets.data(), static_cast<int64_t>(sizes.size()),
                          [&](const kernels::AscentSegments<P>& table) {
                            const int64_t blocks = blocks_for(launcher, chunks_of(table), held);
                            arguments.rows = first_row + count * kSumSize;
                            launcher.run("ascent_", kernels::ascent<T, P, kRealised, kMomentum>,
                                         blocks, kernels::kThreads, table, arguments);
                            count += blocks;
                          });
  const double* const to_add = first_row;
  launcher.run("ascent_", kernels::ascent_finish<T>, 1, kernels::kThreads, to_add, count, sums);
}

Tensor ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, std::vector<Tensor> g1,
               std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
               std::optional<std::vector<Tensor>> theta, double momentum, std::optional<Tensor> p,
               std::optional<Tensor> p_next) {
  const Device device = device_of(q, "q");
  check_buffer(q, "q", device);
  check_same_buffer(d, "d", q, "q", device);
  check_segments(g0, "g0", offsets, q, device);
  check_segments(g1, "g1", offsets, q, device);
  check_like(g1, "g1", g0, "g0");
  check_vector(state, "state", kStateSize, device);
  check_sign(sign);
  check_both(p, "p", p_next, "p_next");
  STD_TORCH_CHECK(p.has_value() || momentum == 0.0, "momentum: ", momentum, " needs p and p_next");
  if (theta) {
    check_like(*theta, "theta", g0, "g0");
    check_segments(*theta, "theta", offsets, q, device);
  }
  if (p) {
    check_same_buffer(*p, "p", q, "q", device);
    check_same_buffer(*p_next, "p_next", q, "q", device);
  }

  const Launcher launcher(device);
  const Tensor sums = torch::stable::new_empty(state, {int64_t{kSumSize}});
  const ScalarType storage = g0.empty() ? q.scalar_type() : g0[0].scalar_type();
  with_buffer_and_storage(q.scalar_type(), storage, [&](auto* buffer, auto* stored) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(stored)>;
    const kernels::AscentArguments<T> arguments{written<T>(d),
                                                read<T>(q),
                                                p ? read<T>(*p) : nullptr,
                                                p ? written<T>(*p_next) : nullptr,
                                                read<double>(state),
                                                static_cast<double>(sign),
                                                weight_decay,
                                                momentum,
                                                nullptr};
    with_flags(theta.has_value(), p.has_value(), [&](auto realised, auto heavy) {
      ascent_typed<T, P, decltype(realised)::value, decltype(heavy)::value>(
          launcher, g0, g1, offsets, theta ? *theta : g0, state, arguments, written<double>(sums));
    });
  });
  return sums;
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("ascent_", TORCH_BOX(&lyapcuda::cuda::ascent_));
}
