// Tests of csrc/kernels under the emulator csrc/simt: all families, those named, or all others.
//
//   simt_tests [[--without] FAMILY ...]
#include <chrono>
#include <cstring>

#include "check.h"

namespace lyapcuda::test {
void simt_tiles_tests();
void simt_probe_tests();
void simt_gram_tests();
void simt_transform_tests();
void simt_panel_ascent_tests();
void simt_benettin_tests();
void simt_quasi_newton_tests();
void simt_huge_tests();
}  // namespace lyapcuda::test

int main(int count, char** arguments) {
  using namespace lyapcuda::test;
  const bool without = count > 1 && std::strcmp(arguments[1], "--without") == 0;
  const struct {
    const char* name;
    void (*tests)();
  } families[] = {
      {"emulator", simt_emulator_tests},   {"tiles", simt_tiles_tests},
      {"ascent", simt_ascent_tests},       {"kernels", simt_kernel_tests},
      {"probe", simt_probe_tests},         {"gram", simt_gram_tests},
      {"transform", simt_transform_tests}, {"panel_ascent", simt_panel_ascent_tests},
      {"benettin", simt_benettin_tests},   {"quasi_newton", simt_quasi_newton_tests},
      {"huge", simt_huge_tests},
  };
  for (int i = 1 + without; i < count; ++i) {
    bool known = false;
    for (const auto& family : families) known |= std::strcmp(arguments[i], family.name) == 0;
    if (!known) {
      std::printf("no family is called %s\n", arguments[i]);
      return 2;
    }
  }
  for (const auto& family : families) {
    bool named = count == 1;
    for (int i = 1; i < count; ++i) named |= std::strcmp(arguments[i], family.name) == 0;
    if (named == without) continue;
    const auto start = std::chrono::steady_clock::now();
    family.tests();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%-14s %6.1f s\n", family.name, took.count());
  }
  std::printf("%ld passed, %ld failed\n", counts.passed, counts.failed);
  return counts.failed == 0 && counts.passed > 0 ? 0 : 1;
}
