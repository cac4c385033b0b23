// Every kernel that the backend launches, for the nvcc check (check_ptx.py).
#include "../kernels/ascent.cuh"
#include "../kernels/exponent.cuh"
#include "../kernels/recenter.cuh"
#include "../kernels/reseed.cuh"
#include "../kernels/stream_copy.cuh"

namespace lyapcuda::kernels {

#define LYAPCUDA_ASCENT(T, P, kRealised, kMomentum)            \
  template __global__ void ascent<T, P, kRealised, kMomentum>( \
      const __grid_constant__ AscentSegments<P>, const __grid_constant__ AscentArguments<T>);
#define LYAPCUDA_STORAGE(T, P)                                                         \
  LYAPCUDA_ASCENT(T, P, false, false)                                                  \
  LYAPCUDA_ASCENT(T, P, false, true)                                                   \
  LYAPCUDA_ASCENT(T, P, true, false)                                                   \
  LYAPCUDA_ASCENT(T, P, true, true)                                                    \
  template __global__ void recenter<T, P>(const __grid_constant__ RecenterSegments<P>, \
                                          const __grid_constant__ RecenterArguments<T>);

LYAPCUDA_STORAGE(float, float)
LYAPCUDA_STORAGE(float, BFloat16)
LYAPCUDA_STORAGE(float, Half)
LYAPCUDA_STORAGE(double, double)
template __global__ void ascent_finish<float>(const double*, int64_t, double*);
template __global__ void ascent_finish<double>(const double*, int64_t, double*);
template __global__ void reseed<float>(const __grid_constant__ ReseedSegments<float>,
                                       const __grid_constant__ ReseedArguments<float>);
template __global__ void reseed<double>(const __grid_constant__ ReseedSegments<double>,
                                        const __grid_constant__ ReseedArguments<double>);

}  // namespace lyapcuda::kernels
