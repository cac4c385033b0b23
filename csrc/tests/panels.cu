// The other kernels on panels, and those of a Hessian product, for the nvcc check (check_ptx.py).
#include "../kernels/benettin.cuh"
#include "../kernels/combine.cuh"
#include "../kernels/difference.cuh"
#include "../kernels/displace.cuh"
#include "../kernels/gram.cuh"
#include "../kernels/panel_recenter.cuh"
#include "../kernels/project.cuh"

namespace lyapcuda::kernels {

#define LYAPCUDA_STORAGE(T, P)                                                             \
  template __global__ void panel_recenter<T, P>(                                           \
      const __grid_constant__ PanelRecenterSegments<P>,                                    \
      const __grid_constant__ PanelRecenterArguments<T, P>);                               \
  template __global__ void displace<T, P>(const __grid_constant__ DisplaceSegments<P>,     \
                                          const __grid_constant__ DisplaceArguments<T>);   \
  template __global__ void difference<T, P>(const __grid_constant__ DifferenceSegments<P>, \
                                            const __grid_constant__ DifferenceArguments<T>);
LYAPCUDA_STORAGE(float, float)
LYAPCUDA_STORAGE(float, BFloat16)
LYAPCUDA_STORAGE(float, Half)
LYAPCUDA_STORAGE(double, double)

#define LYAPCUDA_SIDE(T, kSide) \
  template __global__ void gram<T, kSide>(const __grid_constant__ GramArguments<T>);
#define LYAPCUDA_BUFFER(T)                                                               \
  LYAPCUDA_SIDE(T, GramSide::kSmallSymmetric)                                            \
  LYAPCUDA_SIDE(T, GramSide::kLargeSymmetric)                                            \
  LYAPCUDA_SIDE(T, GramSide::kSmall)                                                     \
  LYAPCUDA_SIDE(T, GramSide::kLarge)                                                     \
  template __global__ void combine<T, 32>(const __grid_constant__ CombineArguments<T>);  \
  template __global__ void combine<T, 128>(const __grid_constant__ CombineArguments<T>); \
  template __global__ void project<T, 32>(const __grid_constant__ ProjectArguments<T>);  \
  template __global__ void project<T, 129>(const __grid_constant__ ProjectArguments<T>);
LYAPCUDA_BUFFER(float)
LYAPCUDA_BUFFER(double)

}  // namespace lyapcuda::kernels
