// Compiles the first part of LYAPCUDA_SOURCE, its arithmetic, for this backend.
#ifdef LYAPCUDA_ON_CUDA
#define LYAPCUDA_ELEMENT
namespace lyapcuda::kernels {
#include LYAPCUDA_SOURCE
}  // namespace lyapcuda::kernels
#undef LYAPCUDA_ELEMENT
#else
#include "../cpu/for_each_target.h"
#endif
