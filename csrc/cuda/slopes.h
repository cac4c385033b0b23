// The slopes of a direction along the rows of a panel, on CUDA: kernels/slopes.cuh.
#pragma once

#include "../kernels/slopes.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

template <class T, class P, Momentum kMomentum>
void slopes(const Launcher& launcher, const SlopesCall& call) {
  constexpr int kHeld = 4;  // blocks of a multiprocessor
  const int k = static_cast<int>(call.panel.size(0));
  const auto lists =
      lists_of<P>(call.theta, call.offsets, read<P>(call.theta), read<P>(call.gradient));
  const Tensor partial = scratch_rows(launcher, lists.count(), kHeld, k);
  double* const first = written<double>(partial);
  kernels::SlopesArguments<T> arguments{
      read<T>(call.panel),       call.panel.size(1),       k,
      written<T>(call.buffer),   read<double>(call.state), read<double>(call.factor),
      call.options.weight_decay, call.options.momentum,    nullptr};
  kernels::with_rows<16, 33>(k + 1, [&](auto most) {
    const int64_t count = for_each_launch(
        launcher, lists, kHeld,
        [&](const kernels::DirectionSegments<P>& table, int64_t blocks, int64_t before) {
          arguments.partial = first + before * k;
          launcher.run("slopes_", kernels::slopes<T, P, kMomentum, most()>, blocks,
                       kernels::kThreads, table, arguments);
        },
        kernels::kSlopesLength<T, most()>);
    const double* const to_add = first;
    launcher.run("slopes_", kernels::project_finish, kernels::project_finish_blocks(k - 1),
                 kernels::kThreads, to_add, count, k - 1, call.out);
  });
}

}  // namespace lyapcuda::cuda
