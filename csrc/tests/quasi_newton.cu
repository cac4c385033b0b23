// The kernels of the quasi-Newton steps, for the nvcc check (check_ptx.py).
#include "../kernels/descend.cuh"
#include "../kernels/panel_descend.cuh"
#include "../kernels/panel_slopes.cuh"

namespace lyapcuda::kernels {

#define LYAPCUDA_SLOPES(T, P, kMomentum, kRows)                  \
  template __global__ void panel_slopes<T, P, kMomentum, kRows>( \
      const __grid_constant__ DirectionSegments<P>,              \
      const __grid_constant__ PanelSlopesArguments<T>);
#define LYAPCUDA_STEP(T, P, kMomentum)                                                            \
  template __global__ void descend<T, P, kMomentum>(const __grid_constant__ DirectionSegments<P>, \
                                                    const __grid_constant__ DescendArguments<T>); \
  LYAPCUDA_SLOPES(T, P, kMomentum, 16)                                                            \
  LYAPCUDA_SLOPES(T, P, kMomentum, 33)                                                            \
  template __global__ void panel_descend<T, P, kMomentum>(                                        \
      const __grid_constant__ DirectionSegments<P>,                                               \
      const __grid_constant__ PanelDescendArguments<T>);
#define LYAPCUDA_STORAGE(T, P)          \
  LYAPCUDA_STEP(T, P, Momentum::kNone)  \
  LYAPCUDA_STEP(T, P, Momentum::kHeavy) \
  LYAPCUDA_STEP(T, P, Momentum::kNesterov)

LYAPCUDA_STORAGE(float, float)
LYAPCUDA_STORAGE(float, BFloat16)
LYAPCUDA_STORAGE(float, Half)
LYAPCUDA_STORAGE(double, double)

}  // namespace lyapcuda::kernels
