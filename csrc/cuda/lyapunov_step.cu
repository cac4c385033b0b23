// torch.ops.lyapcuda.lyapunov_step_ on CUDA: one cooperative kernel (kernels/lyapunov_step.cuh)
// where d fits the device's shared memory, else ascent_, exponent_ and a recentring in turn.
#include "../kernels/lyapunov_step.cuh"

#include "../kernels/recenter.cuh"
#include "launch.h"
#include "step.h"

namespace lyapcuda::cuda {
namespace {

// recenter with the roles changed: q is taken from d where the step was committed.
template <class T, class P>
__global__ void __launch_bounds__(kernels::kThreads, 5)
    settle(const __grid_constant__ kernels::RecenterSegments<P> table,
           const __grid_constant__ kernels::RecenterArguments<T> arguments) {
  kernels::Recenter<T, P> op(arguments);
  op.committed = !op.committed;
  kernels::for_each_group(table, op);
}

struct StepTensors {
  std::vector<Tensor> theta1;
  Tensor q;
  std::vector<Tensor> g0, g1, theta;
  std::vector<int64_t> offsets;
  Tensor state, losses;
};

// False, with nothing done, where d doesn't fit or the tensors take more than one table.
template <class T, class P, bool kRealised>
bool step_at_once(const Launcher& launcher, const StepTensors& t, const ExponentOptions& options,
                  double weight_decay) {
  const auto kernel = kernels::lyapunov_step<T, P, kRealised>;
  const auto theta1 = data_of<P>(t.theta1);
  const auto g0 = beside_written<P>(t.g0), g1 = beside_written<P>(t.g1);
  const auto theta = beside_written<P>(t.theta);
  P* const* const lists[4] = {theta1.data(), g0.data(), g1.data(), theta.data()};
  const auto sizes = sizes_of(t.theta);
  kernels::StepSegments<P> only;
  int tables = 0;
  kernels::for_each_table(
      lists, sizes.data(), t.offsets.data(), static_cast<int64_t>(sizes.size()),
      [&](const kernels::StepSegments<P>& table) {
        only = table;
        ++tables;
      },
      kernels::kStepChunk<P>);
  if (tables != 1) return false;
  const int64_t chunks = chunks_of(only), together = launcher.together(kernel, kernels::kThreads);
  if (together == 0 || !kernels::step_fits<T, P>(chunks, together)) return false;

  const int64_t blocks = std::max<int64_t>(std::min(chunks, together), 1);
  const Tensor rows = torch::stable::new_empty(t.state, {blocks, int64_t{kSumSize}});
  const kernels::StepArguments<T> arguments{
      written<T>(t.q), written<double>(t.state), read<double>(t.losses), t.losses.numel(), options,
      weight_decay,    written<double>(rows)};
  launcher.run_together("lyapunov_step_", kernel, blocks, kernels::kThreads, only, arguments);
  return true;
}

template <class T, class P>
void settle_segments(const Launcher& launcher, const StepTensors& t, const Tensor& d) {
  const auto theta1 = data_of<P>(t.theta1);
  const auto theta = beside_written<P>(t.theta);
  P* const* const lists[2] = {theta1.data(), theta.data()};
  const auto sizes = sizes_of(t.theta);
  const kernels::RecenterArguments<T> arguments{written<T>(t.q), read<T>(d), read<double>(t.state)};
  kernels::for_each_table(lists, sizes.data(), t.offsets.data(), static_cast<int64_t>(sizes.size()),
                          [&](const kernels::RecenterSegments<P>& table) {
                            launcher.run("lyapunov_step_", settle<T, P>,
                                         blocks_for(launcher, chunks_of(table), 5),
                                         kernels::kThreads, table, arguments);
                          });
}

void lyapunov_step_(std::vector<Tensor> theta1, Tensor q, std::vector<Tensor> g0,
                    std::vector<Tensor> g1, std::vector<Tensor> theta, std::vector<int64_t> offsets,
                    Tensor state, Tensor losses, int64_t sign, int64_t estimate, bool control,
                    bool alternate, double ema, double weight_decay, bool realised) {
  const Device device = device_of(q, "q");
  check_buffer(q, "q", device);
  check_segments(theta, "theta", offsets, q, device);
  check_segments(theta1, "theta1", offsets, q, device);
  check_like(theta1, "theta1", theta, "theta");
  check_segments(g0, "g0", offsets, q, device);
  check_like(g0, "g0", theta, "theta");
  check_segments(g1, "g1", offsets, q, device);
  check_like(g1, "g1", theta, "theta");
  check_vector(state, "state", kStateSize, device);
  check_vector(losses, "losses", device);
  check_step_options(sign, estimate, 0.0, ema);

  const StepTensors tensors{theta1, q, g0, g1, theta, offsets, state, losses};
  const ExponentOptions options{
      static_cast<double>(sign), static_cast<Estimate>(estimate), 0.0, control, alternate, ema};
  const Launcher launcher(device);
  const ScalarType storage = theta.empty() ? q.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(q.scalar_type(), storage, [&](auto* buffer, auto* stored) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(stored)>;
    const bool done = realised
                          ? step_at_once<T, P, true>(launcher, tensors, options, weight_decay)
                          : step_at_once<T, P, false>(launcher, tensors, options, weight_decay);
    if (done) return;
    const Tensor d = torch::stable::empty_like(q);
    std::optional<std::vector<Tensor>> moved;
    if (realised) moved = theta;
    const Tensor sums = ascent_(d, q, g0, g1, offsets, state, sign, weight_decay, moved, 0.0,
                                std::nullopt, std::nullopt);
    exponent_(state, sums, losses, sign, estimate, 0.0, control, alternate, ema);
    settle_segments<T, P>(launcher, tensors, d);
  });
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("lyapunov_step_", TORCH_BOX(&lyapcuda::cuda::lyapunov_step_));
}
