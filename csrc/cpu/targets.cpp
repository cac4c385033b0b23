#include "targets.h"

#include <cstdlib>
#include <cstring>

namespace lyapcuda::cpu {

Target target() {
  static const Target chosen = [] {
    const char* wanted = std::getenv("LYAPCUDA_SIMD");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return Target::kBaseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Target::kAvx2;
#endif
    return Target::kBaseline;
  }();
  return chosen;
}

const char* target_name() { return target() == Target::kAvx2 ? "avx2" : "baseline"; }

}  // namespace lyapcuda::cpu
