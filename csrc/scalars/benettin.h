// The scalar mathematics of a step with k separations, k ≥ 1: from the Ritz values (ritz.h) to the
// exponents, β, and the transform that makes the next separations orthogonal. Shared by every
// backend (dense_algebra.h: how).
#pragma once

#include "dense_algebra.h"
#include "ritz.h"
#include "stacked_gram.h"
#include "state.h"

namespace lyapcuda {

struct BenettinOptions {
  GrowthOptions step;
  bool realised;  // the Gram matrix has the displacement that rounding left, apart from the carried
  bool rotate;    // take the next separations along the Ritz vectors; false: plain Gram-Schmidt
  const double* displaced;  // the Gram matrix of the rows S∘d_i, with a metric S; may be null
};

// ‖d‖²/‖q‖² below which d is rounding: the copies met.
constexpr double kVanished = 1e-14;

// A spread of squared lengths beyond which one orthonormalisation leaves too few digits.
constexpr double kAgain = 1e6;

// Asks for another separation in the place of one; one thread. A row beyond them: of none.
LYAPCUDA_HOST_DEVICE inline void ask_reseed(const State& state, int row) {
  const bool lost = row < state.k;
  state(StateScalar::reseed) = lost ? row + 1.0 : 0.0;
  if (lost) state(StateScalar::reseeds) += 1.0;
}

// `lost`: the separation that is why, or k.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_refuse(const Team& team, const State& state, int lost) {
  if (team.rank != 0) return;
  state(StateScalar::accepted) = 0.0;
  state(StateScalar::pending) = 0.0;
  state(StateScalar::again) = 0.0;
  state(StateScalar::skipped) += 1.0;
  ask_reseed(state, lost);
}

// QR of D·v for the v in s.u: R as s.l's transpose, v·R⁻¹ in s.u. False where the copies met:
// then s.u is still v, and `met` the column that lies in the span of those before.
template <class Team>
LYAPCUDA_HOST_DEVICE inline bool orthonormalise(const Team& team, int k, const NextGram& next,
                                                const BenettinScratch& s, int* met) {
  for (int e = team.rank; e < k * k; e += team.size) {
    const int i = e / k, j = e % k;
    double sum = 0.0;
    for (int p = 0; p < k; ++p) sum += mul(next(i, p), s.u(p, j));
    s.w(i, j) = sum;
  }
  team.sync();
  for (int e = team.rank; e < k * k; e += team.size) {
    const int i = e / k, j = e % k;
    if (j > i) continue;
    double sum = 0.0;
    for (int p = 0; p < k; ++p) sum += mul(s.u(p, i), s.w(p, j));
    s.dd(i, j) = s.dd(j, i) = sum;
  }
  team.sync();
  for (*met = 0; *met < k; ++*met) {
    if (!(s.dd(*met, *met) > mul(kVanished, s.cc[*met]))) return false;
  }
  *met = cholesky(team, k, s.dd, s.l, kMet);
  if (*met < k) return false;
  solve_right(team, k, s.l, s.u);
  return !any_of(team, s.flags + 6, k * k,
                 [&](int e) { return !std::isfinite(s.u(e / k, e % k)); });
}

struct ScaledGram {  // gram/square
  const double* data;
  int k;
  double square;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const { return data[i * k + j] / square; }
};

// With a metric S: what takes the norm of every S∘q_j to Δq, for the next q_j = ±Δq·Σ_i d_i·u_ij of
// orthonormalise.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void take_displacements(const Team& team, const State& state,
                                                    const BenettinScratch& s,
                                                    const double* displaced) {
  forms(team, state.k, ScaledGram{displaced, state.k, 1.0}, s.u, s.w, s.order);
  for (int j = team.rank; j < state.k; j += team.size) {
    const double found = 1.0 / std::sqrt(s.order[j]);
    if (std::isfinite(found) && found > 0.0) state(StateVector::displacement, j) = found;
  }
}

// β of the next step; one thread.
LYAPCUDA_HOST_DEVICE inline void benettin_control(const State& state, const BenettinScratch& s,
                                                  const GrowthOptions& options, bool parted) {
  double& beta = state(StateScalar::beta);
  if (!parted) {
    beta = mul(0.5, beta);
    return;
  }
  if (options.estimate == Estimate::kPaper) {
    const double lambda = state(StateVector::exponent, 0);
    if (beta != 0.0 && lambda != 0.0 && is_rate(beta / lambda)) beta = beta / lambda;
    return;
  }
  double seen = 0.0, settled = 0.0;
  for (int i = 0; i < state.k; ++i) {
    const Quotient found = quotient(s, i);
    const double norm = norm_seen(found, options.sign);
    if (!(norm <= seen)) seen = norm;
    if (on_unwanted_end(found.rayleigh, found.residual, options.sign)) {
      if (found.secant > settled) settled = found.secant;
    }
  }
  rate_of_secants(beta, state(StateScalar::bound), state(StateScalar::guard), seen, settled,
                  options.sign);
}

// Takes the Gram matrix of one pass into the state. A step with anything not finite leaves every
// value as it was and only counts itself as skipped.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_step(const Team& team, double* values, const double* sums,
                                               const double* losses, int loss_count, int k,
                                               const BenettinOptions& options, double* scratch) {
  const GrowthOptions& step = options.step;
  const State state{values, k};
  const BenettinScratch s(scratch, k);
  const StackedGram gram(sums, k, options.realised, step.momentum > 0.0);
  const int rows = gram.blocks * k, entries = rows * rows;
  const bool unusable = any_of(team, s.flags + 2, entries + loss_count + k, [&](int e) {
    if (e < entries) return !std::isfinite(sums[e]);
    if (e < entries + loss_count) return !std::isfinite(losses[e - entries]);
    const int i = e - entries - loss_count;
    return !(gram.at(0, i, 0, i) > 0.0) || !(gram.at(0, i, gram.moved, i) > 0.0);
  });
  int lost = k;
  if (unusable) {
    // All finite, and still a separation of no length, or one that rounding turned around?
    const bool finite = !any_of(team, s.flags + 7, entries + loss_count, [&](int e) {
      return !std::isfinite(e < entries ? sums[e] : losses[e - entries]);
    });
    for (int i = k - 1; i >= 0 && finite; --i) {
      if (!(gram.at(0, i, 0, i) > 0.0) || !(gram.at(0, i, gram.moved, i) > 0.0)) lost = i;
    }
  }
  if (unusable || !ritz_pairs(team, k, gram, s, step.sign, &lost)) {
    benettin_refuse(team, state, lost);
    return;
  }
  // The basis that D is taken in.
  for (int j = team.rank; j < k; j += team.size) {
    double square = 0.0;
    for (int i = 0; i < k; ++i) square += mul(s.u(i, j), s.u(i, j));
    const double norm = std::sqrt(square);
    for (int i = 0; i < k; ++i) {
      s.u(i, j) = options.rotate ? s.u(i, j) / norm : i == j ? 1.0 : 0.0;
    }
  }
  team.sync();
  forms(team, k, GramBlock{gram, 0, 0, false}, s.u, s.w, s.cc);
  if (any_of(team, s.flags + 5, k,
             [&](int i) { return !std::isfinite(s.cc[i]) || !(s.cc[i] > 0.0); })) {
    benettin_refuse(team, state, k);
    return;
  }

  take_ritz(team, state, s, step);
  const double beta = state(StateScalar::beta), rate = mul(step.sign, beta);
  int met = k;
  const bool parted = orthonormalise(team, k, NextGram{gram, rate}, s, &met);
  if (parted) {
    // d points where q does; the other sign takes the next q to the other side of θ.
    const double scale = mul(step.alternate ? -1.0 : 1.0, state(StateScalar::perturbation));
    for (int e = team.rank; e < k * k; e += team.size) {
      const int i = e / k, j = e % k;
      state(StateMatrix::r, i, j) = i <= j ? s.l(j, i) : 0.0;
      state(StateMatrix::transform, i, j) = mul(s.u(i, j), scale);
    }
  }
  if (parted && options.displaced != nullptr) {
    take_displacements(team, state, s, options.displaced);
  }
  // With β = 0 nothing was stepped. What would have grown, had the rate been that of the next step,
  // follows from the same products.
  const bool first = beta == 0.0 && step.control && parted;
  if (first && team.rank == 0) benettin_control(state, s, step, parted);
  team.sync();
  for (int i = team.rank; i < k; i += team.size) {
    double h = state(StateVector::center, i);
    if (parted && (beta != 0.0 || first)) {
      const double next = mul(step.sign, state(StateScalar::beta));
      const double b = first ? next : rate;
      const double lambda = first ? expected_exponent(next, s.ritz[i], s.yy[i] / s.mm[i])
                                  : std::log(s.l(i, i) / std::sqrt(s.cc[i]));
      state(StateVector::exponent, i) = lambda;
      if (of_growth(step.estimate)) {
        const double measured = curvature_of_growth(lambda, b, step.momentum, step.estimate);
        if (std::isfinite(measured)) h = measured;
      }
    }
    double& mean = state(StateVector::h_ema, i);
    state(StateVector::h, i) = h;
    state(StateVector::error, i) = error_of(h, quotient(s, i), state(StateVector::first, i),
                                            state(StateScalar::refined) != 0.0, step);
    mean = std::isfinite(mean) ? mul(step.ema, mean) + mul(1.0 - step.ema, h) : h;
  }
  team.sync();
  if (team.rank != 0) return;
  double widest = 0.0, narrowest = INFINITY;
  for (int j = 0; j < k && parted; ++j) {
    widest = std::fmax(widest, s.dd(j, j));
    narrowest = std::fmin(narrowest, mul(s.l(j, j), s.l(j, j)));
  }
  state(StateScalar::pending) = parted ? 1.0 : 0.0;
  state(StateScalar::again) = parted && widest / narrowest > kAgain ? 1.0 : 0.0;
  if (step.control && !first) benettin_control(state, s, step, parted);
  // With a β of the user's the copies would meet again: another in the place of the separation that
  // has most of what was lost. (Where rounding left no finite column, met is k.)
  int largest = k;
  for (int i = 0; i < k && !parted && !step.control && met < k; ++i) {
    if (largest == k || std::fabs(s.u(i, met)) > std::fabs(s.u(largest, met))) largest = i;
  }
  ask_reseed(state, largest);
  state(StateScalar::accepted) = 1.0;
  state(StateScalar::steps) += 1.0;
}

// The second pass: `sums` is the Gram matrix of D·transform, which the first left only roughly
// orthonormal. The transform becomes what is still to be applied.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_refine(const Team& team, double* values,
                                                 const double* sums, int k, double* scratch) {
  const State state{values, k};
  const BenettinScratch s(scratch, k);
  if (state(StateScalar::again) == 0.0) return;
  const double size = state(StateScalar::perturbation);
  const ScaledGram gram{sums, k, mul(size, size)};
  const bool usable =
      !any_of(team, s.flags + 2, k * k, [&](int e) { return !std::isfinite(gram(e / k, e % k)); });
  const int met = usable ? cholesky(team, k, gram, s.l, kMet) : 0;
  bool parted = met == k;
  if (parted) {
    for (int e = team.rank; e < k * k; e += team.size) {
      s.u(e / k, e % k) = e / k == e % k ? 1.0 : 0.0;
    }
    team.sync();
    solve_right(team, k, s.l, s.u);
    parted =
        !any_of(team, s.flags + 3, k * k, [&](int e) { return !std::isfinite(s.u(e / k, e % k)); });
  }
  if (parted) {
    for (int e = team.rank; e < k * k; e += team.size) {
      const int i = e / k, j = e % k;
      double sum = 0.0;
      for (int p = i; p <= j; ++p) sum += mul(s.l(p, i), state(StateMatrix::r, p, j));
      s.w(i, j) = sum;
      state(StateMatrix::transform, i, j) = s.u(i, j);
    }
    team.sync();
    for (int e = team.rank; e < k * k; e += team.size) {
      state(StateMatrix::r, e / k, e % k) = s.w(e / k, e % k);
    }
    for (int i = team.rank; i < k; i += team.size) {
      state(StateVector::exponent, i) += std::log(s.l(i, i));
    }
  }
  team.sync();
  if (team.rank != 0) return;
  if (!parted) state(StateScalar::pending) = 0.0;
  if (usable && met < k) ask_reseed(state, met);
  state(StateScalar::again) = 0.0;
}

}  // namespace lyapcuda
