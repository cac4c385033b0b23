// The other kernels on panels, and those of a Hessian product, for the nvcc check (check_ptx.py).
#include "../kernels/benettin.cuh"
#include "../kernels/combine.cuh"
#include "../kernels/difference.cuh"
#include "../kernels/displace.cuh"
#include "../kernels/gram.cuh"
#include "../kernels/panel_recenter.cuh"
#include "../kernels/project.cuh"

namespace lyapcuda::kernels {

#define LYAPCUDA_RECENTER(T, P, kRows)                  \
  template __global__ void panel_recenter<T, P, kRows>( \
      const __grid_constant__ PanelRecenterSegments<P>, \
      const __grid_constant__ PanelRecenterArguments<T, P>);
#define LYAPCUDA_STORAGE(T, P)                                                             \
  LYAPCUDA_RECENTER(T, P, 8)                                                               \
  LYAPCUDA_RECENTER(T, P, 16)                                                              \
  LYAPCUDA_RECENTER(T, P, 32)                                                              \
  template __global__ void displace<T, P>(const __grid_constant__ DisplaceSegments<P>,     \
                                          const __grid_constant__ DisplaceArguments<T>);   \
  template __global__ void difference<T, P>(const __grid_constant__ DifferenceSegments<P>, \
                                            const __grid_constant__ DifferenceArguments<T>);
LYAPCUDA_STORAGE(float, float)
LYAPCUDA_STORAGE(float, BFloat16)
LYAPCUDA_STORAGE(float, Half)
LYAPCUDA_STORAGE(double, double)

#define LYAPCUDA_GRAM(T, kSymmetric, kRows) \
  template __global__ void gram<T, kSymmetric, kRows>(const __grid_constant__ GramArguments<T>);
#define LYAPCUDA_COMBINE(T, kRows) \
  template __global__ void combine<T, kRows>(const __grid_constant__ CombineArguments<T>);
#define LYAPCUDA_PROJECT(T, kRows) \
  template __global__ void project<T, kRows>(const __grid_constant__ ProjectArguments<T>);
#define LYAPCUDA_BUFFER(T)     \
  LYAPCUDA_GRAM(T, true, 8)    \
  LYAPCUDA_GRAM(T, true, 16)   \
  LYAPCUDA_GRAM(T, true, 32)   \
  LYAPCUDA_GRAM(T, true, 128)  \
  LYAPCUDA_GRAM(T, false, 64)  \
  LYAPCUDA_GRAM(T, false, 256) \
  LYAPCUDA_COMBINE(T, 8)       \
  LYAPCUDA_COMBINE(T, 16)      \
  LYAPCUDA_COMBINE(T, 32)      \
  LYAPCUDA_COMBINE(T, 128)     \
  LYAPCUDA_PROJECT(T, 16)      \
  LYAPCUDA_PROJECT(T, 32)      \
  LYAPCUDA_PROJECT(T, 129)
LYAPCUDA_BUFFER(float)
LYAPCUDA_BUFFER(double)

}  // namespace lyapcuda::kernels
