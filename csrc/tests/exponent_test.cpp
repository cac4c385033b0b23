// The scalar mathematics of a step (exponent.h).
#include "../newton.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"

namespace lyapcuda::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<double> fresh_state() {
  std::vector<double> state(kStateSize, kNan);
  for (int64_t field :
       {k_bound, k_guard, k_committed, k_accepted, k_steps, k_skipped, k_reseed, k_reseeds}) {
    state[field] = 0.0;
  }
  state[k_perturbation] = 0.1;
  state[k_scale] = 0.1;
  state[k_beta] = 0.5;
  return state;
}

// The sums of a step whose separation is an eigenvector of h, with norm 1.
std::vector<double> eigen_sums(double h, double b) {
  std::vector<double> sums(kSumSize);
  sums[kSumDD] = (1 + b * h) * (1 + b * h);
  sums[kSumQQ] = sums[kSumCarriedQ] = 1.0;
  sums[kSumQY] = sums[kSumCarriedY] = h;
  sums[kSumYY] = h * h;
  return sums;
}

void growth_round_trips() {
  // μ² − (1 + m + b·h)·μ + m = 0 is the growth of p' = m·p + h·q, q' = q + b·p'.
  for (double sign : {1.0, -1.0}) {
    for (double momentum : {0.0, 0.5, 0.9}) {
      for (double bh : {1e-6, 1e-3, 0.1, 1.0, 1.718281828459045, 40.0}) {
        const double b = sign * 0.05, h = bh / b, trace = 1 + momentum + bh;
        const double growth = (trace + std::sqrt(trace * trace - 4 * momentum)) / 2;
        const double lambda = momentum == 0.0 ? std::log1p(bh) : std::log(growth);
        const double back = curvature_of_growth(lambda, b, momentum, Estimate::kGrowth);
        // log and the subtractions leave 1e-15 of a growth of 1 + bh.
        CHECK(near(back, h, 1e-13 + 1e-14 / bh));
      }
    }
  }
  CHECK(curvature_of_growth(0.5, 0.25, 0.0, Estimate::kPaper) == 2.0);
  CHECK(near(curvature_of_growth(0.5, -0.25, 0.9, Estimate::kPaper), -(0.25 + 0.05) / 0.25, 1e-15));
  CHECK(!std::isfinite(curvature_of_growth(0.5, 0.0, 0.0, Estimate::kGrowth)));
  CHECK(!std::isfinite(curvature_of_growth(800.0, 1.0, 0.9, Estimate::kGrowth)));
}

void learning_rates_stay_in_bounds() {
  CHECK(learning_rate(4.0, 1.0, 10.0) == 0.25);
  CHECK(learning_rate(0.1, 1.0, 10.0) == 10.0);
  for (double h : {0.0, -0.0, -3.0, -kInf, 1e-320, kNan})
    CHECK(learning_rate(h, 1.0, 10.0) == 10.0);
  CHECK(learning_rate(kInf, 1.0, 10.0) == 0.0);
  for (double h = 1e-300; h < 1e300; h *= 7.3) {
    const double lr = learning_rate(h, 1.9, 10.0);
    CHECK(lr > 0.0 && lr <= 19.0);
  }
}

// The rate after a step that found the eigenvalue h exactly.
void settled_rate(std::vector<double>& state, double h, double sign) {
  secant_rate(state.data(), {h, 0.0, std::fabs(h)}, sign);
}

void guard_remembers_the_unwanted_end() {
  for (double sign : {1.0, -1.0}) {
    std::vector<double> state = fresh_state();
    settled_rate(state, sign * 2.0, sign);  // along the wanted end: nothing to guard
    CHECK(state[k_guard] == 0.0 && near(state[k_beta], kTargetGrowth / 2.0, 1e-15));
    secant_rate(state.data(), {-sign * 1.0, 7.0, 7.1}, sign);  // a mixture of both ends
    const double seen = sign > 0.0 ? 7.1 : 8.0;                // a descent takes |ρ| + r
    CHECK(state[k_guard] == 0.0 && near(state[k_beta], kTargetGrowth / seen, 1e-15));
    const double memory = sign > 0.0 ? kAscentMemory : 1.0;
    settled_rate(state, -sign * 5.0, sign);
    CHECK(state[k_guard] == 5.0 && near(state[k_bound], memory * seen, 1e-15));
    CHECK(near(state[k_beta], kTargetGrowth / (memory * seen), 1e-15));
    for (int step = 0; step < 200; ++step) settled_rate(state, sign * 2.0, sign);
    // An ascent has forgotten all but the guard, a descent nothing.
    CHECK(near(state[k_beta], kTargetGrowth / (sign > 0.0 ? 5.0 : 8.0), 1e-15));
    settled_rate(state, sign * 8.0, sign);
    CHECK(state[k_guard] == 5.0 && near(state[k_beta], kTargetGrowth / 8.0, 1e-15));
  }
  std::vector<double> state = fresh_state();
  settled_rate(state, 0.0, 1.0);
  CHECK(state[k_beta] == 0.5);
  settled_rate(state, 1e-320, 1.0);  // its inverse is no number
  CHECK(state[k_beta] == 0.5);
}

void steps_take_or_refuse() {
  const ExponentOptions options{1.0, Estimate::kRayleigh, 0.0, true, true, 0.0};
  const double losses[2] = {1.0, 2.0};
  std::vector<double> state = fresh_state();
  exponent_step(state.data(), eigen_sums(3.0, 0.5).data(), losses, 2, options);
  CHECK(state[k_accepted] == 1.0 && state[k_committed] == 1.0 && state[k_steps] == 1.0);
  CHECK(state[k_h] == 3.0 && state[k_h_ema] == 3.0 && state[k_residual] == 0.0);
  CHECK(near(state[k_exponent], std::log(2.5), 1e-15));
  CHECK(near(state[k_scale], -0.1 / 2.5, 1e-15));
  CHECK(near(state[k_beta], kTargetGrowth / 3.0, 1e-15));

  // The next step looks from the other side: h is the mean, and the middle of the error bar.
  std::vector<double> next = state;
  exponent_step(next.data(), eigen_sums(4.0, next[k_beta]).data(), losses, 2, options);
  CHECK(next[k_h] == 3.5 && next[k_rayleigh] == 4.0 && next[k_center] == 3.5);
  CHECK(next[k_scale] < 0.0);

  for (double bad : {kInf, -kInf, kNan}) {
    for (int64_t at = 0; at < kSumSize + 2; ++at) {
      std::vector<double> sums = eigen_sums(3.0, 0.5), loss = {1.0, 2.0}, after = state;
      (at < kSumSize ? sums[at] : loss[at - kSumSize]) = bad;
      exponent_step(after.data(), sums.data(), loss.data(), 2, options);
      CHECK(after[k_accepted] == 0.0 && after[k_committed] == 0.0);
      CHECK(after[k_skipped] == state[k_skipped] + 1.0);
      for (int64_t field : {k_accepted, k_committed, k_skipped}) after[field] = state[field];
      CHECK(after == state);
    }
  }

  std::vector<double> met = fresh_state();
  exponent_step(met.data(), eigen_sums(-2.0, 0.5).data(), losses, 2, options);  // 1 + βh = 0
  CHECK(met[k_accepted] == 1.0 && met[k_committed] == 0.0 && met[k_beta] == 0.25);
  CHECK(met[k_reseed] == 0.0 && met[k_reseeds] == 0.0);
  CHECK(met[k_scale] == 0.1 && met[k_h] == -2.0);
}

}  // namespace

void exponent_tests() {
  growth_round_trips();
  learning_rates_stay_in_bounds();
  guard_remembers_the_unwanted_end();
  steps_take_or_refuse();
}

}  // namespace lyapcuda::test
