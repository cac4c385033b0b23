// From the Gram matrix of a step with k separations to the Ritz values, their vectors and their
// error bars; and the scratch memory that the whole step works in. Shared by every backend
// (dense_algebra.h: how).
#pragma once

#include "dense_algebra.h"
#include "stacked_gram.h"
#include "state.h"

namespace lyapcuda {

// A squared distance from the span of the vectors before, below this part of the vector's squared
// length, is rounding. In D: the copies met. In the separations themselves: they are not k vectors.
constexpr double kMet = 1e-12;

// Doubles of scratch memory that a step needs: 36 KB for 32 separations.
LYAPCUDA_HOST_DEVICE constexpr int benettin_scratch(int k) {
  return 4 * matrix_size(k) + 3 * (even(k) / 2) + 7 * k + 8;
}

struct BenettinScratch {
  Matrix l, u, w, dd;
  Rotations rotations;
  double *ritz, *order, *yy, *my, *mm, *cc;  // of k each
  double* flags;                             // of 8, the first two for the rotations

  LYAPCUDA_HOST_DEVICE BenettinScratch(double* memory, int k) {
    const int size = matrix_size(k), stride = matrix_stride(k), pairs = even(k) / 2;
    l = {memory, stride};
    u = {memory + size, stride};
    w = {memory + 2 * size, stride};
    dd = {memory + 3 * size, stride};
    double* next = memory + 4 * size;
    flags = next;
    next += 8;
    rotations = {next, next + pairs, next + 2 * pairs, next + 3 * pairs, flags};
    next += 3 * pairs + k;
    ritz = next;
    order = next + k;
    yy = next + 2 * k;
    my = next + 3 * k;
    mm = next + 4 * k;
    cc = next + 5 * k;
  }
};

// The columns of z by Ritz value, the wanted end first, as vectors of the carried panel: u = l⁻ᵀ·z.
// The largest entry of each is positive.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void sort_ritz(const Team& team, int k, const BenettinScratch& s,
                                           double sign) {
  for (int i = team.rank; i < k; i += team.size) s.order[i] = i;  // for values that overflowed
  team.sync();
  for (int i = team.rank; i < k; i += team.size) {
    const double value = s.u(i, i);
    int place = 0;
    for (int j = 0; j < k; ++j) {
      const double other = s.u(j, j);
      const bool before = sign > 0.0 ? other > value : other < value;
      if (before || (other == value && j < i)) ++place;
    }
    s.order[place] = i;
    s.ritz[place] = value;
  }
  team.sync();
  for (int e = team.rank; e < k * k; e += team.size) {
    const int i = e / k, j = e % k;
    s.u(i, j) = s.w(i, static_cast<int>(s.order[j]));
  }
  team.sync();
  solve_left_transposed(team, k, s.l, s.u);
  for (int j = team.rank; j < k; j += team.size) {
    double largest = 0.0;
    for (int i = 0; i < k; ++i) {
      if (std::fabs(s.u(i, j)) > std::fabs(largest)) largest = s.u(i, j);
    }
    if (largest >= 0.0) continue;
    for (int i = 0; i < k; ++i) s.u(i, j) = -s.u(i, j);
  }
  team.sync();
}

// The Ritz values of the panel, their vectors in s.u, and what the error bars need. False where
// something is not finite, or the panel is not of full rank: then `lost` is the first row in the
// span of those before, else k.
template <class Team>
LYAPCUDA_HOST_DEVICE inline bool ritz_pairs(const Team& team, int k, const StackedGram& gram,
                                            const BenettinScratch& s, double sign, int* lost) {
  const GramBlock a{gram, 0, gram.y, true}, b{gram, 0, gram.moved, true};
  *lost = cholesky(team, k, b, s.l, kMet);
  if (*lost < k) return false;
  whiten(team, k, a, s.l, s.u);
  if (any_of(team, s.flags + 3, k * k, [&](int e) { return !std::isfinite(s.u(e / k, e % k)); })) {
    return false;
  }
  eigen(team, k, s.u, s.w, s.rotations);
  sort_ritz(team, k, s, sign);
  forms(team, k, GramBlock{gram, gram.y, gram.y, false}, s.u, s.w, s.yy);
  // Where the displacement was not rounded these are uᵀAu and uᵀBu.
  forms(team, k, GramBlock{gram, gram.moved, gram.y, false}, s.u, s.w, s.my);
  forms(team, k, GramBlock{gram, gram.moved, gram.moved, false}, s.u, s.w, s.mm);
  return !any_of(team, s.flags + 4, k, [&](int i) {
    return !std::isfinite(s.ritz[i]) || !std::isfinite(s.yy[i]) || !std::isfinite(s.my[i]) ||
           !std::isfinite(s.mm[i]) || !(s.mm[i] > 0.0);
  });
}

LYAPCUDA_HOST_DEVICE inline double ritz_residual(const BenettinScratch& s, int i) {
  const double ritz = s.ritz[i];
  const double square = s.yy[i] - mul(mul(2.0, ritz), s.my[i]) + mul(mul(ritz, ritz), s.mm[i]);
  return square > 0.0 ? std::sqrt(square / s.mm[i]) : 0.0;
}

LYAPCUDA_HOST_DEVICE inline Quotient quotient(const BenettinScratch& s, int i) {
  return {s.ritz[i], ritz_residual(s, i), std::sqrt(s.yy[i] / s.mm[i])};
}

// The Ritz values and their error bars, direction by direction.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void take_ritz(const Team& team, const State& state,
                                           const BenettinScratch& s, const GrowthOptions& options) {
  for (int i = team.rank; i < state.k; i += team.size) {
    const double ritz = s.ritz[i], residual = ritz_residual(s, i);
    const Bar bar = error_bar(ritz, residual, state(StateVector::rayleigh, i),
                              state(StateVector::residual, i), options);
    state(StateVector::center, i) = bar.center;
    state(StateVector::width, i) = bar.width;
    state(StateVector::rayleigh, i) = ritz;
    state(StateVector::residual, i) = residual;
    if (state(StateScalar::refined) == 0.0) {
      const double secant = length_of(ritz, residual);
      state(StateVector::first, i) = secant > 0.0 ? residual / secant : 0.0;
    }
  }
}

}  // namespace lyapcuda
