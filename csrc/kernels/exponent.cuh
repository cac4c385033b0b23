// From the sums of a pass to λ, β, h and the error bar, on the device: one thread.
#pragma once

#include "../exponent.h"
#include "../simt/simt.h"

namespace lyapcuda::kernels {

__global__ void __launch_bounds__(32)
    exponent(double* state, const double* sums, const double* losses, int64_t loss_count,
             const ExponentOptions options) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    exponent_step(state, sums, losses, loss_count, options);
  }
}

__global__ void __launch_bounds__(32) secant(double* state, const double* sums, double sign) {
  if (blockIdx.x == 0 && threadIdx.x == 0 && usable(sums)) {
    secant_rate(state, quotient(sums), sign);
  }
}

}  // namespace lyapcuda::kernels
