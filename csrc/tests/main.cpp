// Tests of what Python can't reach: the emulator itself, how work is cut, what errors say.
#include "check.h"

int main() {
  using namespace lyapcuda::test;
  blocks_tests();
  errors_tests();
  simt_emulator_tests();
  std::printf("%ld passed, %ld failed\n", counts.passed, counts.failed);
  return counts.failed == 0 && counts.passed > 0 ? 0 : 1;
}
