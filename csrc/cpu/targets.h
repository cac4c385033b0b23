// Which instruction set the kernels run with, chosen once at load from what the processor has.
#pragma once

namespace lyapcuda::cpu {

enum class Target { kBaseline, kAvx2 };

// The best set this processor has; LYAPCUDA_SIMD=baseline turns the better one off. Both give the
// same bits. (The kernels wait for memory: AVX-512 would have nothing to add.)
Target target();
const char* target_name();

}  // namespace lyapcuda::cpu
