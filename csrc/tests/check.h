// A test is a function that CHECKs; main.cpp runs them all and counts the failed checks.
#pragma once

#include <cmath>
#include <cstdio>

namespace lyapcuda::test {

struct Counts {
  long passed = 0, failed = 0;
};
inline Counts counts;

inline bool check(bool ok, const char* what, const char* file, int line) {
  ++(ok ? counts.passed : counts.failed);
  // One broken loop would say the same thing a thousand times.
  if (!ok && counts.failed <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
  return ok;
}

inline bool near(double a, double b, double relative) {
  return a == b || std::fabs(a - b) <= relative * std::fmax(std::fabs(a), std::fabs(b));
}

#define CHECK(...) ::lyapcuda::test::check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

void blocks_tests();
void errors_tests();
void simt_emulator_tests();

}  // namespace lyapcuda::test
