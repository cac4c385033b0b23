// The second stage of every Gram matrix.
#pragma once

#include "../kernels/panel_gram.cuh"
#include "launch.h"

namespace lyapcuda::cuda {

// `count` rows of partial sums to `out`; zeros where the gate, if there is one, is closed.
void finish_gram(const Launcher& launcher, const char* name, const double* partial, int64_t count,
                 const kernels::GramShape& shape, double* out, const double* gate);

}  // namespace lyapcuda::cuda
