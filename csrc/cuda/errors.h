// What CUDA's errors mean for a user of the ops, in words. Free of torch and of CUDA's headers, so
// that it is tested where there is neither.
#pragma once

#include <string>

namespace lyapcuda::cuda {

// Of cudaError_t (csrc/cuda/launch.h holds them against it).
enum LaunchError : int {
  kInsufficientDriver = 35,
  kCallRequiresNewerDriver = 36,
  kInvalidDeviceFunction = 98,
  kNoKernelImageForDevice = 209,
  kUnsupportedPtxVersion = 222
};

// The oldest that the kernels are written for.
constexpr int kOldestMajor = 8;

struct Gpu {
  int major, minor;  // compute capability
};

// What is wrong and what to do, for an error of which more can be said than CUDA does; else empty.
//
//   built_for   the architectures in this build, as in "sm_80, sm_90"
//   version     of the CUDA toolkit that built it, as in "13.0"
inline std::string advice(int error, Gpu gpu, const std::string& built_for,
                          const std::string& version) {
  const std::string number = std::to_string(gpu.major) + "." + std::to_string(gpu.minor);
  const std::string name = "sm_" + std::to_string(gpu.major) + std::to_string(gpu.minor);
  switch (error) {
    case kNoKernelImageForDevice:
    case kInvalidDeviceFunction:
      if (gpu.major < kOldestMajor) {
        return "this GPU is " + name + ", and lyapcuda's kernels need sm_80 (A100) or newer";
      }
      return "lyapcuda is built for " + built_for + " and has no code for this GPU, " + name +
             ": build it again with TORCH_CUDA_ARCH_LIST=" + number;
    case kUnsupportedPtxVersion:
      return "lyapcuda is built for " + built_for + ", and this GPU's driver is too old to " +
             "compile its code of CUDA " + version + " for " + name +
             ": update the driver, or build lyapcuda again with TORCH_CUDA_ARCH_LIST=" + number;
    case kInsufficientDriver:
    case kCallRequiresNewerDriver:
      return "the GPU's driver is too old for CUDA " + version +
             ", which lyapcuda is built with: update the driver";
    default:
      return "";
  }
}

}  // namespace lyapcuda::cuda
