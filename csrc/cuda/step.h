// The parts of a step that lyapunov_step_ is made of, as the ops of their names do them.
#pragma once

#include "launch.h"

namespace lyapcuda::cuda {

Tensor ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, std::vector<Tensor> g1,
               std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
               std::optional<std::vector<Tensor>> theta, double momentum, std::optional<Tensor> p,
               std::optional<Tensor> p_next);

void exponent_(Tensor state, Tensor sums, Tensor losses, int64_t sign, int64_t estimate,
               double momentum, bool control, bool alternate, double ema);

}  // namespace lyapcuda::cuda
