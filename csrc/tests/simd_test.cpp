// The vector bodies on every instruction set that this machine runs: conversions for all inputs,
// tails of every length, nothing touched outside.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "../cpu/ascent.h"
#include "../cpu/direction.h"
#include "../state.h"
#include "check.h"
#include "walled.h"

namespace lyapcuda::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

}  // namespace lyapcuda::cpu

#define LYAPCUDA_BODY "../tests/bodies.inc"
#include "../cpu/for_each_target.h"

namespace lyapcuda::test {
namespace {

using cpu::BFloat16;
using cpu::Half;

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Walled, and zero where it may be written.
template <class T>
class Zeroed : public Walled<T> {
 public:
  Zeroed(int64_t n, int64_t shift, int64_t behind) : Walled<T>(n, shift, behind) {
    for (int64_t i = 0; i < n; ++i) this->data()[i] = T(0.0f);
  }
};

// Small integers: every product and sum below is exact in every type.
double small(int64_t i, int64_t salt) { return double((i * 7 + salt * 5 + i / 11) % 15 - 7); }

template <class T>
void fill(Zeroed<T>& array, int64_t n, int64_t salt) {
  for (int64_t i = 0; i < n; ++i) array[i] = T(static_cast<float>(small(i, salt)));
}

template <class Bodies, class T, class P, bool kRealised, bool kMomentum, bool kAroundCache>
void ascent_tail(int64_t n, int64_t shift, int64_t behind) {
  Zeroed<T> d(n, shift, behind), q(n, shift, behind), p(n, shift, behind), next(n, shift, behind);
  Zeroed<P> g0(n, shift, behind), g1(n, shift, behind), theta(n, shift, behind);
  fill(q, n, 1);
  fill(p, n, 2);
  fill(g0, n, 3);
  fill(g1, n, 4);
  fill(theta, n, 5);
  const cpu::AscentScalars s{0.25, -0.5, 0.5, 0.5};
  const cpu::AscentArguments<T, P> a{d.data(),     q.data(), g0.data(),  g1.data(),
                                     theta.data(), p.data(), next.data()};
  double sums[kSumSize];
  Bodies::template ascent<T, P, kRealised, kMomentum, kAroundCache>(a, n, s, sums);

  double expected[kSumSize] = {};
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const double carried = s.scale * small(i, 1), here = small(i, 5);
    const double moved =
        kRealised ? double(float(P(static_cast<float>(here + carried)))) - here : carried;
    const double y = small(i, 4) - small(i, 3) + s.weight_decay * moved;
    const double w = y + (kMomentum ? s.momentum * s.scale * small(i, 2) : 0.0);
    const double out = carried + s.rate * w;
    same = same && double(d[i]) == out && (!kMomentum || double(next[i]) == w);
    expected[kSumDD] += out * out;
    expected[kSumQQ] += moved * moved;
    expected[kSumQY] += moved * y;
    expected[kSumYY] += y * y;
    expected[kSumCarriedQ] += carried * moved;
    expected[kSumCarriedY] += carried * y;
  }
  CHECK(same);
  CHECK(sums[kSumQQ] == expected[kSumQQ]);
  CHECK(sums[kSumQY] == expected[kSumQY]);
  CHECK(sums[kSumYY] == expected[kSumYY]);
  if (cpu::kSumsD<T, kRealised, kMomentum>) CHECK(sums[kSumDD] == expected[kSumDD]);
  if (kRealised) {
    CHECK(sums[kSumCarriedQ] == expected[kSumCarriedQ]);
    CHECK(sums[kSumCarriedY] == expected[kSumCarriedY]);
  }
  CHECK(d.whole() && q.whole() && p.whole() && next.whole());
  CHECK(g0.whole() && g1.whole() && theta.whole());
  if (!kMomentum) {
    for (int64_t i = 0; i < n; ++i) CHECK(double(next[i]) == 0.0);
  }
}

template <class Bodies, class T, class P>
void recenter_tail(int64_t n, int64_t shift, int64_t behind, bool committed, bool around_cache) {
  Zeroed<T> q(n, shift, behind), previous(n, shift, behind);
  Zeroed<P> theta(n, shift, behind), theta1(n, shift, behind);
  fill(q, n, 1);
  fill(previous, n, 2);
  fill(theta, n, 3);
  Bodies::template recenter<T, P>(theta1.data(), q.data(), previous.data(), theta.data(), n, -0.25,
                                  committed, around_cache);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const double kept = small(i, committed ? 1 : 2);
    same = same && double(q[i]) == kept && double(previous[i]) == small(i, 2);
    const double moved = small(i, 3) - 0.25 * kept;
    same = same && float(theta1[i]) == float(P(static_cast<float>(moved)));
  }
  CHECK(same);
  CHECK(q.whole() && previous.whole() && theta.whole() && theta1.whole());
}

template <class Bodies, class T, class P>
void descend_tail(int64_t n, int64_t shift, int64_t behind, Momentum kind) {
  Zeroed<P> theta(n, shift, behind), gradient(n, shift, behind);
  Zeroed<T> buffer(n, shift, behind);
  fill(theta, n, 1);
  fill(gradient, n, 2);
  fill(buffer, n, 3);
  Bodies::template descend<T, P>({theta.data(), gradient.data(), buffer.data()}, n, 0.25,
                                 {0.5, 0.5}, kind);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const double g = small(i, 2) + 0.5 * small(i, 1), next = 0.5 * small(i, 3) + g;
    const double u = kind == Momentum::kNone ? g : kind == Momentum::kHeavy ? next : g + 0.5 * next;
    const double moved = small(i, 1) - 0.25 * u;
    same = same && float(theta[i]) == float(P(static_cast<float>(moved)));
    same = same && double(buffer[i]) == (kind == Momentum::kNone ? small(i, 3) : next);
  }
  CHECK(same);
  CHECK(theta.whole() && gradient.whole() && buffer.whole());
}

template <class Bodies>
void copy_tail(int64_t n, int64_t shift, int64_t behind, bool around_cache) {
  Zeroed<float> to(n, shift, behind), from(n, 1, behind);
  fill(from, n, 1);
  Bodies::copy(to.data(), from.data(), n, around_cache);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) same = same && double(to[i]) == small(i, 1);
  CHECK(same);
  CHECK(to.whole() && from.whole());
}

template <class Bodies, class T, class P>
void tails_of() {
  for (int64_t n : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 23, 31, 33, 255, 257, 4097}) {
    for (int64_t shift : {0, 1, 3}) {
      for (int64_t behind : {0, 64}) {
        ascent_tail<Bodies, T, P, false, false, false>(n, shift, behind);
        ascent_tail<Bodies, T, P, false, true, false>(n, shift, behind);
        ascent_tail<Bodies, T, P, true, false, false>(n, shift, behind);
        ascent_tail<Bodies, T, P, true, true, false>(n, shift, behind);
        for (bool committed : {false, true}) {
          recenter_tail<Bodies, T, P>(n, shift, behind, committed, false);
        }
        for (Momentum kind : {Momentum::kNone, Momentum::kHeavy, Momentum::kNesterov}) {
          descend_tail<Bodies, T, P>(n, shift, behind, kind);
        }
        copy_tail<Bodies>(n, shift, behind, false);
        if (shift != 0) continue;  // around the cache only to aligned lines
        ascent_tail<Bodies, T, P, false, false, true>(n, shift, behind);
        ascent_tail<Bodies, T, P, true, true, true>(n, shift, behind);
        recenter_tail<Bodies, T, P>(n, shift, behind, true, true);
        copy_tail<Bodies>(n, shift, behind, true);
      }
    }
  }
}

template <class Bodies, class P>
void conversions_of() {
  constexpr int64_t kAll = 65536;
  std::vector<P> stored(kAll);
  std::vector<float> values(kAll), back(kAll);
  for (int64_t i = 0; i < kAll; ++i) stored[i] = bits_as<P>(static_cast<uint16_t>(i));
  Bodies::template read<P>(values.data(), stored.data(), kAll);
  bool same = true;
  for (int64_t i = 0; i < kAll; ++i) {
    const float expected = static_cast<float>(stored[i]);
    same = same &&
           (std::isnan(expected) ? std::isnan(values[i])
                                 : bits_as<uint32_t>(values[i]) == bits_as<uint32_t>(expected));
  }
  CHECK(same);
  // Every upper half with lower halves at and beside the ties of both types.
  for (uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x2000u, 0x3000u, 0x5000u,
                       0x7000u, 0x7fffu, 0x8000u, 0x8001u, 0x9000u, 0xb000u, 0xffffu}) {
    for (uint32_t high = 0; high < kAll; ++high) {
      values[high] = bits_as<float>(high << 16 | low);
    }
    Bodies::template write<P>(stored.data(), values.data(), kAll);
    Bodies::template round<P>(back.data(), values.data(), kAll);
    same = true;
    for (int64_t i = 0; i < kAll; ++i) {
      const P expected(values[i]);
      if (std::isnan(values[i])) {
        same = same && std::isnan(static_cast<float>(stored[i])) && std::isnan(back[i]);
      } else {
        same = same && bits_as<uint16_t>(stored[i]) == bits_as<uint16_t>(expected) &&
               bits_as<uint32_t>(back[i]) == bits_as<uint32_t>(static_cast<float>(expected));
      }
    }
    CHECK(same);
  }
}

template <class Bodies>
void all_of() {
  tails_of<Bodies, float, float>();
  tails_of<Bodies, float, BFloat16>();
  tails_of<Bodies, float, Half>();
  tails_of<Bodies, double, double>();
  conversions_of<Bodies, BFloat16>();
  conversions_of<Bodies, Half>();
}

}  // namespace

void simd_tests() {
  all_of<cpu::baseline::Bodies>();
#if defined(__x86_64__)
  if (cpu::target() == cpu::Target::kAvx2) all_of<cpu::avx2::Bodies>();
#endif
  std::printf("instruction sets: baseline%s\n",
              cpu::target() == cpu::Target::kAvx2 ? ", avx2" : "");
}

}  // namespace lyapcuda::test
