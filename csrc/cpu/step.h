// The parts of a step that lyapunov_step_ is made of, as the ops of their names do them.
#pragma once

#include "../exponent.h"
#include "tensors.h"

namespace lyapcuda::cpu {

Tensor ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, std::vector<Tensor> g1,
               std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
               std::optional<std::vector<Tensor>> theta, double momentum, std::optional<Tensor> p,
               std::optional<Tensor> p_next);

void exponent_(Tensor state, Tensor sums, Tensor losses, int64_t sign, int64_t estimate,
               double momentum, bool control, bool alternate, double ema);

// theta1 = θ + scale·q; where q is not `kept`, it is taken from `other` first.
void recenter_segments(const std::vector<Tensor>& theta1, const Tensor& q, const Tensor& other,
                       const std::vector<Tensor>& theta, const std::vector<int64_t>& offsets,
                       double scale, bool kept);

}  // namespace lyapcuda::cpu
