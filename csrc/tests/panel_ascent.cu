// panel_ascent as the backend launches it, for the nvcc check (check_ptx.py).
#include "../kernels/gram_finish.cuh"
#include "../kernels/panel_ascent.cuh"

namespace lyapcuda::kernels {

#define LYAPCUDA_ROWS(T, P, kRealised, kMomentum, kRows)                    \
  template __global__ void panel_ascent<T, P, kRealised, kMomentum, kRows>( \
      const __grid_constant__ PanelAscentSegments<P>,                       \
      const __grid_constant__ PanelAscentArguments<T, P>);
#define LYAPCUDA_ASCENT(T, P, kRealised, kMomentum) \
  LYAPCUDA_ROWS(T, P, kRealised, kMomentum, 16)     \
  LYAPCUDA_ROWS(T, P, kRealised, kMomentum, 32)     \
  LYAPCUDA_ROWS(T, P, kRealised, kMomentum, 64)
// 32 separations are more than 64 rows only with more than two rows each.
#define LYAPCUDA_STORAGE(T, P)          \
  LYAPCUDA_ASCENT(T, P, false, false)   \
  LYAPCUDA_ASCENT(T, P, false, true)    \
  LYAPCUDA_ASCENT(T, P, true, false)    \
  LYAPCUDA_ASCENT(T, P, true, true)     \
  LYAPCUDA_ROWS(T, P, false, true, 128) \
  LYAPCUDA_ROWS(T, P, true, false, 128) \
  LYAPCUDA_ROWS(T, P, true, true, 128)

LYAPCUDA_STORAGE(float, float)
LYAPCUDA_STORAGE(float, BFloat16)
LYAPCUDA_STORAGE(float, Half)
LYAPCUDA_STORAGE(double, double)

#define LYAPCUDA_CHECK(T) \
  template __global__ void panel_ascent_check<T>(double*, int, bool, bool, const double*, double);
LYAPCUDA_CHECK(float)
LYAPCUDA_CHECK(double)

}  // namespace lyapcuda::kernels
