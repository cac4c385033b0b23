// Tests of csrc/kernels under the emulator csrc/simt.
#include "check.h"

int main() {
  using namespace lyapcuda::test;
  simt_emulator_tests();
  simt_ascent_tests();
  simt_kernel_tests();
  std::printf("%ld passed, %ld failed\n", counts.passed, counts.failed);
  return counts.failed == 0 && counts.passed > 0 ? 0 : 1;
}
