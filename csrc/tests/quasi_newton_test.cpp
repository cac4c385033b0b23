// The steps with k curvatures: their scalars (newton.h), and the bodies on every instruction set.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <limits>
#include <vector>

#include "../cpu/direction.h"
#include "../cpu/panel.h"
#include "check.h"
#include "walled.h"

namespace lyapcuda::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

}  // namespace lyapcuda::cpu

#define LYAPCUDA_BODY "../tests/quasi_newton_bodies.inc"
#include "../cpu/for_each_target.h"

namespace lyapcuda::test {
namespace {

using cpu::BFloat16;
using cpu::Half;

// --- scalars ------------------------------------------------------------------------------------
// Three separations of norm 2 along the coordinates, of curvatures 8, −4 and 1, the last to ±0.5.
std::vector<double> some_panel_state() {
  std::vector<double> state(panel_size(3), 0.0);
  state[panel_offset(PanelScalar::perturbation)] = 2.0;
  state[panel_offset(PanelScalar::accepted)] = state[panel_offset(PanelScalar::pending)] = 1.0;
  const double h[3] = {8.0, -4.0, 1.0};
  for (int j = 0; j < 3; ++j) {
    state[panel_offset(PanelVector::h_ema, 3) + j] = h[j];
    state[panel_offset(PanelMatrix::transform, 3) + j * 4] = j + 1;  // diagonal
  }
  state[panel_offset(PanelVector::residual, 3) + 2] = 0.5;
  return state;
}

void rates_follow_the_curvatures() {
  std::vector<double> state = some_panel_state();
  const Newton newton{state.data(), 3, 0.5, 10.0};
  CHECK(newton.go(1.0) && newton.has_vectors() && newton.rest() == 1.5);
  CHECK(newton.rate(0) == 0.5 / 8.0 && newton.rate(1) == 0.5 / 4.0);
  CHECK(newton.rate(2) == 0.5 / 1.5 && newton.rate(3) == 0.5 / 1.5);
  const Newton bounded{state.data(), 3, 0.5, 0.2};
  CHECK(bounded.rate(0) == 0.5 / 8.0 && bounded.rate(1) == 0.1 && bounded.rate(3) == 0.1);

  const double slopes[3] = {1.0, 10.0, 100.0}, size = 4.0;
  double along[3];
  for (int j = 0; j < 3; ++j) along[j] = newton.along(slopes, j);
  CHECK(along[0] == (newton.rate(0) - newton.rate(3)) * 1.0 / size);
  CHECK(along[1] == (newton.rate(1) - newton.rate(3)) * 20.0 / size && along[2] == 0.0);
  CHECK(newton.weight(along, 1) == 2.0 * along[1]);

  // Where the copies met there are no vectors: the shortest step everywhere.
  state[panel_offset(PanelScalar::pending)] = 0.0;
  CHECK(!newton.has_vectors() && newton.rate(3) == 0.5 / 8.0);

  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(!newton.go(nan));
  state[panel_offset(PanelVector::h_ema, 3) + 1] = nan;
  CHECK(!newton.go(1.0));
  state = some_panel_state();
  state[panel_offset(PanelScalar::accepted)] = 0.0;
  CHECK(!Newton{state.data(), 3, 0.5, 10.0}.go(1.0));
}

// --- bodies -------------------------------------------------------------------------------------
// Small integers: every product and sum below is exact in every type.
double small(int64_t i, int64_t salt) { return double((i * 7 + salt * 5 + i / 11) % 15 - 7); }

template <class T>
struct Array : Walled<T> {
  Array(int64_t n, int64_t shift, int64_t salt) : Walled<T>(n, shift, shift == 0 ? 64 : 0) {
    for (int64_t i = 0; i < n; ++i) (*this)[i] = T(static_cast<float>(small(i, salt)));
  }
};

template <class Bodies, class T, class P, Momentum kMomentum>
void step_tail(int64_t k, int64_t n, int64_t shift) {
  Array<P> theta(n, shift, 1), gradient(n, shift, 2);
  Array<T> buffer(n, shift, 3), panel(k * n, shift, 4);
  const cpu::DirectionArguments<T, P> a{theta.data(), gradient.data(), buffer.data()};
  const cpu::PanelRows<T> rows{panel.data(), k, n};
  const cpu::DirectionScalars s{0.5, 0.5};
  std::vector<double> sums(k, 0.0), expected(k, 0.0);
  std::vector<T> weights(k);
  for (int64_t r = 0; r < k; ++r) weights[r] = T(0.25f * static_cast<float>(r % 5 - 2));

  Bodies::template slopes<T, P, kMomentum>(a, rows, n, s, sums.data());
  bool same = true;
  std::vector<double> moved(n);
  for (int64_t i = 0; i < n; ++i) {
    const double g = small(i, 2) + 0.5 * small(i, 1), next = 0.5 * small(i, 3) + g;
    const double u = kMomentum == Momentum::kNone    ? g
                     : kMomentum == Momentum::kHeavy ? next
                                                     : g + 0.5 * next;
    same = same && double(buffer[i]) == (kMomentum == Momentum::kNone ? small(i, 3) : next);
    moved[i] = small(i, 1) - 0.25 * u;
    for (int64_t r = 0; r < k; ++r) {
      expected[r] += u * double(panel[r * n + i]);
      moved[i] -= double(weights[r]) * double(panel[r * n + i]);
    }
    same = same && double(theta[i]) == small(i, 1);
  }
  CHECK(same && sums == expected);

  Bodies::template descend<T, P, kMomentum>(a, rows, weights.data(), n, 0.25, s);
  for (int64_t i = 0; i < n; ++i) {
    same = same && double(theta[i]) == double(P(static_cast<float>(moved[i])));
  }
  CHECK(same);
  CHECK(theta.whole() && gradient.whole() && buffer.whole() && panel.whole());
}

template <class Bodies, class T, class P>
void tails_of() {
  for (int64_t n : {0, 1, 7, 8, 9, 31, 33, 511, 512, 513, 1025}) {
    for (int64_t shift : {0, 1}) {
      for (int64_t k : {0, 1, 3, 4, 9}) {
        step_tail<Bodies, T, P, Momentum::kNone>(k, n, shift);
        step_tail<Bodies, T, P, Momentum::kHeavy>(k, n, shift);
        step_tail<Bodies, T, P, Momentum::kNesterov>(k, n, shift);
      }
    }
  }
}

template <class Bodies>
void all_of() {
  tails_of<Bodies, float, float>();
  tails_of<Bodies, float, BFloat16>();
  tails_of<Bodies, float, Half>();
  tails_of<Bodies, double, double>();
}

}  // namespace

void quasi_newton_tests() {
  rates_follow_the_curvatures();
  all_of<cpu::baseline::QuasiNewtonBodies>();
#if defined(__x86_64__)
  if (cpu::target() == cpu::Target::kAvx2) all_of<cpu::avx2::QuasiNewtonBodies>();
#endif
}

}  // namespace lyapcuda::test
