// The scalar mathematics of a step on the CPU: one thread.
#pragma once

#include "../scalars/benettin.h"
#include "backend.h"

namespace lyapcuda::cpu {

inline void step(const Launcher&, double* state, const double* gram, const double* losses,
                 int loss_count, int k, const BenettinOptions& options) {
  std::vector<double> scratch(benettin_scratch(k));
  benettin_step(SoloTeam{}, state, gram, losses, loss_count, k, options, scratch.data());
}

inline void refine(const Launcher&, double* state, const double* gram, int k) {
  std::vector<double> scratch(benettin_scratch(k));
  benettin_refine(SoloTeam{}, state, gram, k, scratch.data());
}

}  // namespace lyapcuda::cpu
