// The bodies over panels on every instruction set that this machine runs: tails of every length,
// exact sums, nothing read or touched outside.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <vector>

#include "../cpu/difference.h"
#include "../cpu/panel.h"
#include "check.h"
#include "walled.h"

namespace lyapcuda::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

}  // namespace lyapcuda::cpu

#define LYAPCUDA_BODY "../tests/panel_bodies.inc"
#include "../cpu/for_each_target.h"

namespace lyapcuda::test {
namespace {

using cpu::BFloat16;
using cpu::Half;

// Small integers: every product and sum below is exact in every type.
double small(int64_t i, int64_t salt) { return double((i * 7 + salt * 5 + i / 11) % 15 - 7); }

// `rows` rows of n elements, walled in; nothing lies behind those that are off alignment.
template <class T>
class Panel : public Walled<T> {
 public:
  Panel(int64_t rows, int64_t n, int64_t shift, int64_t salt)
      : Walled<T>(rows * n, shift, shift == 0 ? 64 : 0) {
    for (int64_t i = 0; i < rows * n; ++i) (*this)[i] = T(static_cast<float>(small(i, salt)));
  }
};

double factor(int64_t i, int64_t j) { return 0.5 * double((i * 3 + j * 5) % 7 - 3); }

template <class T>
std::vector<T> factors(int64_t rows, int64_t columns) {
  std::vector<T> out(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) out[i] = T(factor(i / columns, i % columns));
  return out;
}

template <class Bodies, class T>
void gram_tail(int64_t ka, int64_t kb, int64_t n, int64_t shift, bool same) {
  Panel<T> a(ka, n, shift, 1), b(kb, n, shift, same ? 1 : 2);
  std::vector<double> tile((ka + kb) * cpu::kGramTile), out(ka * kb, 0.0);
  const cpu::GramArguments<T> arguments{a.data(), same ? a.data() : b.data(), ka, kb, n, same};
  Bodies::template gram<T>(arguments, 0, n, tile.data(), out.data());
  bool right = true;
  for (int64_t i = 0; i < ka; ++i) {
    for (int64_t j = 0; j < (same ? i + 1 : kb); ++j) {
      double expected = 0.0;
      for (int64_t e = 0; e < n; ++e) expected += double(a[i * n + e]) * double(b[j * n + e]);
      right = right && out[i * kb + j] == expected;
    }
  }
  CHECK(right);
  CHECK(a.whole() && b.whole());
}

template <class Bodies, class T, class P, bool kRealised, bool kMomentum>
void ascent_tail(int64_t k, int64_t n, int64_t shift) {
  constexpr int64_t kBlocks = 2 + kRealised + kMomentum;
  Panel<T> d(k, n, shift, 0), q(k, n, shift, 1), p(k, n, shift, 2), next(k, n, shift, 0);
  Panel<P> g0(1, n, shift, 3), g1(k, n, shift, 4), theta(1, n, shift, 5);
  const cpu::PanelAscentScalars s{-0.5, 0.5, 0.5};
  const cpu::PanelAscentArguments<T, P> a{d.data(), q.data(),    g0.data(), g1.data(), theta.data(),
                                          p.data(), next.data(), k,         n};
  const int64_t stacked = kBlocks * k;
  std::vector<double> tile(stacked * cpu::kGramTile), sums(stacked * stacked, 0.0);
  std::vector<double> rows(stacked * n);
  Bodies::template ascent<T, P, kRealised, kMomentum>(a, n, s, tile.data(), sums.data());
  bool same = true;
  for (int64_t i = 0; i < k * n; ++i) {
    const double carried = small(i, 1), here = small(i % n, 5);
    const double moved =
        kRealised ? double(float(P(static_cast<float>(here + carried)))) - here : carried;
    const double y = small(i, 4) - small(i % n, 3) + s.weight_decay * moved;
    const double w = y + (kMomentum ? s.momentum * small(i, 2) : 0.0);
    const double out = carried + s.rate * w;
    same = same && double(d[i]) == out && double(next[i]) == (kMomentum ? w : small(i, 0));
    rows[i] = carried;
    rows[k * n + i] = y;
    if (kRealised) rows[2 * k * n + i] = moved;
    if (kMomentum) rows[(kBlocks - 1) * k * n + i] = out;
  }
  CHECK(same);
  for (int64_t i = 0; i < stacked; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double expected = 0.0;
      for (int64_t e = 0; e < n; ++e) expected += rows[i * n + e] * rows[j * n + e];
      same = same && sums[i * stacked + j] == expected;
    }
  }
  CHECK(same);
  CHECK(d.whole() && q.whole() && p.whole() && next.whole());
  CHECK(g0.whole() && g1.whole() && theta.whole());
}

template <class Bodies, class T>
void combine_tail(int64_t ki, int64_t ko, int64_t n, int64_t shift, bool in_place) {
  Panel<T> panel(ki, n, shift, 1), other(ko, n, shift, 2);
  const std::vector<T> matrix = factors<T>(ki, ko);
  std::vector<T> tile(ki * cpu::combine_tile(ki));
  T* const out = in_place ? panel.data() : other.data();
  Bodies::template combine<T>({out, panel.data(), matrix.data(), ki, ko, n}, n, tile.data());
  bool same = true;
  for (int64_t j = 0; j < ko; ++j) {
    for (int64_t e = 0; e < n; ++e) {
      double expected = 0.0;
      for (int64_t i = 0; i < ki; ++i) expected += small(i * n + e, 1) * factor(i, j);
      same = same && double(out[j * n + e]) == expected;
    }
  }
  for (int64_t i = in_place ? ko * n : 0; i < ki * n; ++i) {
    same = same && double(panel[i]) == small(i, 1);
  }
  CHECK(same);
  CHECK(panel.whole() && other.whole());
}

template <class Bodies, class T, class P>
void recenter_tail(int64_t k, int64_t n, int64_t shift, bool pending) {
  Panel<T> q(k, n, shift, 1), d(k, n, shift, 2);
  Panel<P> copies(k, n, shift, 3), theta(1, n, shift, 4);
  const std::vector<T> matrix = factors<T>(k, k);
  std::vector<T> tile(k * cpu::combine_tile(k));
  const cpu::PanelRecenterArguments<T, P> arguments{
      {q.data(), d.data(), matrix.data(), k, k, n}, copies.data(), theta.data(), pending};
  Bodies::template recenter<T, P>(arguments, n, tile.data());
  bool same = true;
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t e = 0; e < n; ++e) {
      double expected = pending ? 0.0 : small(j * n + e, 1);
      for (int64_t i = 0; i < k && pending; ++i) expected += small(i * n + e, 2) * factor(i, j);
      const double moved = small(e, 4) + expected;
      same = same && double(q[j * n + e]) == expected;
      same = same && float(copies[j * n + e]) == float(P(static_cast<float>(moved)));
    }
  }
  for (int64_t i = 0; i < k * n; ++i) same = same && double(d[i]) == small(i, 2);
  CHECK(same);
  CHECK(q.whole() && d.whole() && copies.whole() && theta.whole());
}

template <class Bodies, class T>
void project_tail(int64_t m, int64_t n, int64_t shift) {
  Panel<T> w(1, n, shift, 1), v(m, n, shift, 2);
  const std::vector<T> c = factors<T>(m, 1);
  std::vector<double> sums(m + 1, 0.0), expected(m + 1, 0.0);
  Bodies::template project<T>(w.data(), v.data(), n, c.data(), m, n, sums.data());
  bool same = true;
  for (int64_t e = 0; e < n; ++e) {
    double left = small(e, 1);
    for (int64_t i = 0; i < m; ++i) left -= factor(i, 0) * small(i * n + e, 2);
    same = same && double(w[e]) == left;
    for (int64_t i = 0; i < m; ++i) expected[i] += left * small(i * n + e, 2);
    expected[m] += left * left;
  }
  CHECK(same && sums == expected);
  CHECK(w.whole() && v.whole());
}

template <class Bodies, class T, class P>
void displace_tail(int64_t n, int64_t shift) {
  Panel<T> v(1, n, shift, 1);
  Panel<P> copies(1, n, shift, 2), theta(1, n, shift, 3);
  double sums[2], expected[2] = {};
  Bodies::template displace<T, P>(copies.data(), v.data(), theta.data(), n, -0.25, sums);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const float there = float(P(static_cast<float>(small(i, 3) - 0.25 * small(i, 1))));
    same = same && float(copies[i]) == there && double(v[i]) == small(i, 1);
    expected[0] += small(i, 1) * (double(there) - small(i, 3));
    expected[1] += small(i, 1) * small(i, 1);
  }
  CHECK(same && sums[0] == expected[0] && sums[1] == expected[1]);
  CHECK(copies.whole() && v.whole() && theta.whole());
}

template <class Bodies, class T, class P, bool kDecay, bool kKeep>
void difference_tail(int64_t n, int64_t shift) {
  Panel<T> out(1, n, shift, 1), v(1, n, shift, 2);
  Panel<P> plus(1, n, shift, 3), minus(1, n, shift, 4);
  Bodies::template difference<T, P, kDecay, kKeep>(
      {out.data(), plus.data(), minus.data(), kDecay ? v.data() : nullptr}, n, {2.0, 0.5, -0.25});
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    double expected = 2.0 * (small(i, 3) - small(i, 4));
    if (kDecay) expected += 0.5 * small(i, 2);
    if (kKeep) expected -= 0.25 * small(i, 1);
    same = same && double(out[i]) == expected;
  }
  CHECK(same);
  CHECK(out.whole() && v.whole() && plus.whole() && minus.whole());
}

template <class Bodies, class T, class P>
void tails_of() {
  for (int64_t n : {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 513, 1025}) {
    for (int64_t shift : {0, 1, 3}) {
      for (int64_t k : {1, 2, 3, 5, 9}) {
        ascent_tail<Bodies, T, P, false, false>(k, n, shift);
        ascent_tail<Bodies, T, P, false, true>(k, n, shift);
        ascent_tail<Bodies, T, P, true, false>(k, n, shift);
        ascent_tail<Bodies, T, P, true, true>(k, n, shift);
        recenter_tail<Bodies, T, P>(k, n, shift, true);
        recenter_tail<Bodies, T, P>(k, n, shift, false);
      }
      displace_tail<Bodies, T, P>(n, shift);
      difference_tail<Bodies, T, P, false, false>(n, shift);
      difference_tail<Bodies, T, P, false, true>(n, shift);
      difference_tail<Bodies, T, P, true, false>(n, shift);
      difference_tail<Bodies, T, P, true, true>(n, shift);
    }
  }
}

template <class Bodies, class T>
void matrices_of() {
  for (int64_t n : {0, 1, 8, 17, 255, 257, 513, 1025}) {
    for (int64_t shift : {0, 1}) {
      for (int64_t ka : {1, 2, 3, 4, 7, 33}) {
        gram_tail<Bodies, T>(ka, ka, n, shift, true);
        for (int64_t kb : {1, 2, 3, 5}) {
          gram_tail<Bodies, T>(ka, kb, n, shift, false);
          combine_tail<Bodies, T>(ka, kb, n, shift, false);
          if (kb <= ka) combine_tail<Bodies, T>(ka, kb, n, shift, true);
        }
        combine_tail<Bodies, T>(ka, ka, n, shift, true);
        project_tail<Bodies, T>(ka, n, shift);
      }
      project_tail<Bodies, T>(0, n, shift);
    }
  }
}

template <class Bodies>
void all_of() {
  tails_of<Bodies, float, float>();
  tails_of<Bodies, float, BFloat16>();
  tails_of<Bodies, float, Half>();
  tails_of<Bodies, double, double>();
  matrices_of<Bodies, float>();
  matrices_of<Bodies, double>();
}

}  // namespace

void panel_tests() {
  all_of<cpu::baseline::PanelBodies>();
#if defined(__x86_64__)
  if (cpu::target() == cpu::Target::kAvx2) all_of<cpu::avx2::PanelBodies>();
#endif
}

}  // namespace lyapcuda::test
