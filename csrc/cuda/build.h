// How the CUDA backend was built.
#pragma once

#include <string>

namespace lyapcuda::cuda {

std::string built_for();        // its architectures, as in "sm_80, sm_90"
std::string toolkit_version();  // of the CUDA toolkit, as in "13.0"

}  // namespace lyapcuda::cuda
