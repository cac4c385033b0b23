#include "build.h"

namespace lyapcuda::cuda {

#ifdef __CUDACC__

std::string built_for() {
  std::string names;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    names += (names.empty() ? "sm_" : ", sm_") + std::to_string(architecture / 10);
  }
  return names;
}

std::string toolkit_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

#else

std::string built_for() { return "the emulator"; }
std::string toolkit_version() { return "none"; }

#endif

}  // namespace lyapcuda::cuda
