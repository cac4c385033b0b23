// Tests of the parts that need no torch at run time.
#include "check.h"

int main() {
  using namespace lyapcuda::test;
  exponent_tests();
  blocks_tests();
  simd_tests();
  panel_tests();
  benettin_tests();
  quasi_newton_tests();
  errors_tests();
  std::printf("%ld passed, %ld failed\n", counts.passed, counts.failed);
  return counts.failed == 0 && counts.passed > 0 ? 0 : 1;
}
