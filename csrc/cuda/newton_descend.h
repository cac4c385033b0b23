// The quasi-Newton step with k curvatures on CUDA: kernels/newton_descend.cuh.
#pragma once

#include "../kernels/newton_descend.cuh"
#include "backend.h"

namespace lyapcuda::cuda {

template <class T, class P, Momentum kMomentum>
void newton_descend(const Launcher& launcher, const NewtonDescendCall& call) {
  const kernels::NewtonDescendArguments<T> arguments{read<T>(call.panel),
                                                     call.panel.size(1),
                                                     static_cast<int>(call.panel.size(0)),
                                                     read<T>(call.buffer),
                                                     read<double>(call.state),
                                                     read<double>(call.slopes),
                                                     read<double>(call.factor),
                                                     call.gain,
                                                     call.max_lr,
                                                     call.options.weight_decay,
                                                     call.options.momentum,
                                                     call.out};
  // Without any tensor there is one launch all the same: it writes the rates.
  for_each_launch(
      launcher,
      lists_of<P>(call.theta, call.offsets, written<P>(call.theta), read<P>(call.gradient)), 4,
      [&](const kernels::Segments<P, 2>& table, int64_t blocks, int64_t) {
        launcher.run("descend_", kernels::newton_descend<T, P, kMomentum>, blocks,
                     kernels::kThreads, table, arguments);
      });
}

}  // namespace lyapcuda::cuda
