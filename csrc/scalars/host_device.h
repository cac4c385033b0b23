// What host and device code both call: the mark of such a function, and their product.
#pragma once

#ifdef __CUDACC__
#define LYAPCUDA_HOST_DEVICE __host__ __device__
#else
#define LYAPCUDA_HOST_DEVICE
#endif

namespace lyapcuda {

// A product that no compiler contracts with a sum.
LYAPCUDA_HOST_DEVICE inline double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#elif defined(LYAPCUDA_CONTRACT)  // g++ may fuse here, as nvcc may unless told not to
  volatile double rounded = a * b;
  return rounded;
#else
  return a * b;
#endif
}

}  // namespace lyapcuda
