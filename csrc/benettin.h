// The scalar mathematics of a step with k separations: from the Gram matrix of the panels carried,
// y, (moved), (d) to the Ritz values and their error bars, the exponents, and the transform that
// makes the next separations orthogonal. Shared by every backend (panel_algebra.h: how).
#pragma once

#include "panel_algebra.h"
#include "panel_state.h"

namespace lyapcuda {

struct BenettinOptions {
  ExponentOptions step;
  bool realised;  // the Gram matrix has the displacement that rounding left, apart from the carried
  bool rotate;    // take the next separations along the Ritz vectors; false: plain Gram-Schmidt
};

// A squared distance from the span of the vectors before, below this part of the vector's squared
// length, is rounding. In D: the copies met. In the separations themselves: they are not k vectors.
constexpr double kPanelMet = 1e-12;
// A spread of squared lengths beyond which one orthonormalisation leaves too few digits.
constexpr double kPanelAgain = 1e6;

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

// The fields of a panel's state.
struct PanelFields {
  double* state;
  int k;
  LYAPCUDA_HOST_DEVICE double& operator()(PanelScalar field) const {
    return state[panel_offset(field)];
  }
  LYAPCUDA_HOST_DEVICE double& operator()(PanelVector field, int i) const {
    return state[panel_offset(field, k) + i];
  }
  LYAPCUDA_HOST_DEVICE double& operator()(PanelMatrix field, int i, int j) const {
    return state[panel_offset(field, k) + i * k + j];
  }
};

// The Gram matrix of the stacked panels, block by block.
struct PanelGram {
  const double* data;
  int k, blocks;        // of k rows each
  int y = 1, moved, d;  // which block is which (0: carried); d = −1: follows from the others

  LYAPCUDA_HOST_DEVICE PanelGram(const double* gram, int size, bool realised, bool heavy)
      : data(gram),
        k(size),
        blocks(2 + realised + heavy),
        moved(realised ? 2 : 0),
        d(heavy ? 2 + realised : -1) {}

  LYAPCUDA_HOST_DEVICE double at(int a, int i, int b, int j) const {
    return data[(a * k + i) * blocks * k + b * k + j];
  }
};

struct PanelBlock {  // one block of it, or its symmetric part
  const PanelGram& gram;
  int a, b;
  bool symmetric;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const {
    const double value = gram.at(a, i, b, j);
    return symmetric ? mul(0.5, value + gram.at(a, j, b, i)) : value;
  }
};

struct PanelNext {  // that of D = C + rate·Y
  const PanelGram& gram;
  double rate;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const {
    if (gram.d >= 0) return gram.at(gram.d, i, gram.d, j);
    const double cross = gram.at(0, i, gram.y, j) + gram.at(0, j, gram.y, i);
    return (gram.at(0, i, 0, j) + mul(rate, cross)) + mul(mul(rate, rate), gram.at(1, i, 1, j));
  }
};

// An element of d may not fit the panel's dtype although the Gram matrix without momentum, which
// has no rows of d, is finite: such a step must not be taken. Marks y's diagonal for one thread.
LYAPCUDA_HOST_DEVICE inline void refuse_overflow(double* gram, int k, bool realised, bool heavy,
                                                 double rate, double largest) {
  const PanelGram stack(gram, k, realised, heavy);
  const PanelNext next{stack, rate};
  for (int j = 0; j < k; ++j) {
    // (Rounding can only bring a square below zero where d is nothing but rounding.)
    const double square = next(j, j);
    if (square < 0.0 || std::sqrt(square) < largest) continue;
    const int64_t row = int64_t{k} + j, rows = int64_t{stack.blocks} * k;
    gram[row * rows + row] = INFINITY;
  }
}

// Asks for another separation in the place of one; one thread. A row beyond them: of none.
LYAPCUDA_HOST_DEVICE inline void ask_reseed(const PanelFields& state, int row) {
  const bool lost = row < state.k;
  state(PanelScalar::reseed) = lost ? row + 1.0 : 0.0;
  if (lost) state(PanelScalar::reseeds) += 1.0;
}

// `lost`: the separation that is why, or k.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_refuse(const Team& team, const PanelFields& state,
                                                 int lost) {
  if (team.rank != 0) return;
  state(PanelScalar::accepted) = 0.0;
  state(PanelScalar::pending) = 0.0;
  state(PanelScalar::again) = 0.0;
  state(PanelScalar::skipped) += 1.0;
  ask_reseed(state, lost);
}

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
LYAPCUDA_HOST_DEVICE inline bool ritz_pairs(const Team& team, int k, const PanelGram& gram,
                                            const BenettinScratch& s, double sign, int* lost) {
  const PanelBlock a{gram, 0, gram.y, true}, b{gram, 0, gram.moved, true};
  *lost = cholesky(team, k, b, s.l, kPanelMet);
  if (*lost < k) return false;
  whiten(team, k, a, s.l, s.u);
  if (any_of(team, s.flags + 3, k * k, [&](int e) { return !std::isfinite(s.u(e / k, e % k)); })) {
    return false;
  }
  eigen(team, k, s.u, s.w, s.rotations);
  sort_ritz(team, k, s, sign);
  forms(team, k, PanelBlock{gram, gram.y, gram.y, false}, s.u, s.w, s.yy);
  // Where the displacement was not rounded these are uᵀAu and uᵀBu.
  forms(team, k, PanelBlock{gram, gram.moved, gram.y, false}, s.u, s.w, s.my);
  forms(team, k, PanelBlock{gram, gram.moved, gram.moved, false}, s.u, s.w, s.mm);
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

// The Ritz values and their error bars, as exponent_step has them for one separation.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void take_ritz(const Team& team, const PanelFields& state,
                                           const BenettinScratch& s,
                                           const ExponentOptions& options) {
  for (int i = team.rank; i < state.k; i += team.size) {
    const double ritz = s.ritz[i], residual = ritz_residual(s, i);
    const Bar bar = error_bar(ritz, residual, state(PanelVector::rayleigh, i),
                              state(PanelVector::residual, i), options.estimate, options.alternate);
    state(PanelVector::center, i) = bar.center;
    state(PanelVector::width, i) = bar.width;
    state(PanelVector::rayleigh, i) = ritz;
    state(PanelVector::residual, i) = residual;
  }
}

// QR of D·v for the v in s.u: R as s.l's transpose, v·R⁻¹ in s.u. False where the copies met:
// then s.u is still v, and `met` the column that lies in the span of those before.
template <class Team>
LYAPCUDA_HOST_DEVICE inline bool orthonormalise(const Team& team, int k, const PanelNext& next,
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
  *met = cholesky(team, k, s.dd, s.l, kPanelMet);
  if (*met < k) return false;
  solve_right(team, k, s.l, s.u);
  return !any_of(team, s.flags + 6, k * k,
                 [&](int e) { return !std::isfinite(s.u(e / k, e % k)); });
}

// β of the next step; one thread.
LYAPCUDA_HOST_DEVICE inline void benettin_control(const PanelFields& state,
                                                  const BenettinScratch& s,
                                                  const ExponentOptions& options, bool parted) {
  double& beta = state(PanelScalar::beta);
  if (!parted) {
    beta = mul(0.5, beta);
    return;
  }
  if (options.estimate == Estimate::kPaper) {
    const double lambda = state(PanelVector::exponent, 0);
    if (beta != 0.0 && lambda != 0.0 && is_rate(beta / lambda)) beta = beta / lambda;
    return;
  }
  double seen = 0.0, settled = 0.0;
  for (int i = 0; i < state.k; ++i) {
    const Quotient found{s.ritz[i], state(PanelVector::residual, i), std::sqrt(s.yy[i] / s.mm[i])};
    const double norm = norm_seen(found, options.sign);
    if (!(norm <= seen)) seen = norm;
    if (on_unwanted_end(found.rayleigh, found.residual, options.sign)) {
      if (found.secant > settled) settled = found.secant;
    }
  }
  rate_of_secants(beta, state(PanelScalar::bound), state(PanelScalar::guard), seen, settled,
                  options.sign);
}

// Takes the Gram matrix of one pass into the state. A step with anything not finite leaves every
// value as it was and only counts itself as skipped.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_step(const Team& team, double* values, const double* sums,
                                               const double* losses, int loss_count, int k,
                                               const BenettinOptions& options, double* scratch) {
  const ExponentOptions& step = options.step;
  const PanelFields state{values, k};
  const BenettinScratch s(scratch, k);
  const PanelGram gram(sums, k, options.realised, step.momentum > 0.0);
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
  forms(team, k, PanelBlock{gram, 0, 0, false}, s.u, s.w, s.cc);
  if (any_of(team, s.flags + 5, k,
             [&](int i) { return !std::isfinite(s.cc[i]) || !(s.cc[i] > 0.0); })) {
    benettin_refuse(team, state, k);
    return;
  }

  take_ritz(team, state, s, step);
  const double beta = state(PanelScalar::beta), rate = mul(step.sign, beta);
  int met = k;
  const bool parted = orthonormalise(team, k, PanelNext{gram, rate}, s, &met);
  if (parted) {
    // d points where q does; the other sign takes the next q to the other side of θ.
    const double scale = mul(step.alternate ? -1.0 : 1.0, state(PanelScalar::perturbation));
    for (int e = team.rank; e < k * k; e += team.size) {
      const int i = e / k, j = e % k;
      state(PanelMatrix::r, i, j) = i <= j ? s.l(j, i) : 0.0;
      state(PanelMatrix::transform, i, j) = mul(s.u(i, j), scale);
    }
  }
  for (int i = team.rank; i < k; i += team.size) {
    double h = state(PanelVector::center, i);
    if (parted && beta != 0.0) {  // (β = 0: nothing was stepped, so nothing grew)
      const double lambda = std::log(s.l(i, i) / std::sqrt(s.cc[i]));
      state(PanelVector::exponent, i) = lambda;
      if (of_growth(step.estimate)) {
        const double measured = curvature_of_growth(lambda, rate, step.momentum, step.estimate);
        if (std::isfinite(measured)) h = measured;
      }
    }
    double& mean = state(PanelVector::h_ema, i);
    state(PanelVector::h, i) = h;
    mean = std::isfinite(mean) ? mul(step.ema, mean) + mul(1.0 - step.ema, h) : h;
  }
  team.sync();
  if (team.rank != 0) return;
  double widest = 0.0, narrowest = INFINITY;
  for (int j = 0; j < k && parted; ++j) {
    widest = std::fmax(widest, s.dd(j, j));
    narrowest = std::fmin(narrowest, mul(s.l(j, j), s.l(j, j)));
  }
  state(PanelScalar::pending) = parted ? 1.0 : 0.0;
  state(PanelScalar::again) = parted && widest / narrowest > kPanelAgain ? 1.0 : 0.0;
  if (step.control) benettin_control(state, s, step, parted);
  // With a β of the user's the copies would meet again: another in the place of the separation that
  // has most of what was lost. (Where rounding left no finite column, met is k.)
  int largest = k;
  for (int i = 0; i < k && !parted && !step.control && met < k; ++i) {
    if (largest == k || std::fabs(s.u(i, met)) > std::fabs(s.u(largest, met))) largest = i;
  }
  ask_reseed(state, largest);
  state(PanelScalar::accepted) = 1.0;
  state(PanelScalar::steps) += 1.0;
}

struct ScaledGram {  // gram/square
  const double* data;
  int k;
  double square;
  LYAPCUDA_HOST_DEVICE double operator()(int i, int j) const { return data[i * k + j] / square; }
};

// The second pass: `sums` is the Gram matrix of D·transform, which the first left only roughly
// orthonormal. The transform becomes what is still to be applied.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void benettin_refine(const Team& team, double* values,
                                                 const double* sums, int k, double* scratch) {
  const PanelFields state{values, k};
  const BenettinScratch s(scratch, k);
  if (state(PanelScalar::again) == 0.0) return;
  const double size = state(PanelScalar::perturbation);
  const ScaledGram gram{sums, k, mul(size, size)};
  const bool usable =
      !any_of(team, s.flags + 2, k * k, [&](int e) { return !std::isfinite(gram(e / k, e % k)); });
  const int met = usable ? cholesky(team, k, gram, s.l, kPanelMet) : 0;
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
      for (int p = i; p <= j; ++p) sum += mul(s.l(p, i), state(PanelMatrix::r, p, j));
      s.w(i, j) = sum;
      state(PanelMatrix::transform, i, j) = s.u(i, j);
    }
    team.sync();
    for (int e = team.rank; e < k * k; e += team.size) {
      state(PanelMatrix::r, e / k, e % k) = s.w(e / k, e % k);
    }
    for (int i = team.rank; i < k; i += team.size) {
      state(PanelVector::exponent, i) += std::log(s.l(i, i));
    }
  }
  team.sync();
  if (team.rank != 0) return;
  if (!parted) state(PanelScalar::pending) = 0.0;
  if (usable && met < k) ask_reseed(state, met);
  state(PanelScalar::again) = 0.0;
}

}  // namespace lyapcuda
