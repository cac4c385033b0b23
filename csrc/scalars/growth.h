// The scalar mathematics of one direction: growth → curvature, quotients → error bar and ascent
// rate. Plain functions over plain numbers, shared by every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace lyapcuda {

enum class Estimate : int64_t {
  kRayleigh = 0,  // ρ, the mean of two sides: unbiased, signed
  kGrowth = 1,    // exact inversion of the growth: (e^λ − 1)/β
  kPaper = 2,     // the paper's λ/β, which converges to h/(e − 1) under its own control
  kSchwarz = 3,   // y·y/(q·y) of the step alone: the Rayleigh quotient half a step on
  kSecant = 4,    // ‖y‖/‖q‖ with ρ's sign: between ρ and Schwarz
  kOuter = 5      // the outer end of [ρ − r, ρ + r], ρ itself once r is small
};

struct GrowthOptions {
  double sign;  // +1: gradient ascent (largest eigenvalue), −1: descent (smallest)
  Estimate estimate;
  double momentum;  // m of the heavy-ball map, 0 for the plain one
  bool control;     // let β follow the curvature; false: β is the user's
  bool alternate;   // flip the side of the separation at every step
  double ema;       // weight of the past in h_ema
};

// β that makes the growth of curvature `scale` equal to e (λ = 1).
constexpr double kTargetGrowth = 1.718281828459045235;  // e − 1

// What float32 still holds, with room for a factor: a β beyond it would make no step finite.
constexpr double kLargestRate = 1e38;

LYAPCUDA_HOST_DEVICE inline bool is_rate(double beta) { return std::fabs(beta) <= kLargestRate; }

// Curvature of the map whose growth was e^λ with the signed rate b (paper App. A and B).
LYAPCUDA_HOST_DEVICE inline double curvature_of_growth(double lambda, double b, double momentum,
                                                       Estimate estimate) {
  if (estimate == Estimate::kPaper) {
    return momentum == 0.0 ? lambda / b : (mul(lambda, lambda) + mul(lambda, 1.0 - momentum)) / b;
  }
  const double growth = std::exp(lambda);
  return std::expm1(lambda) / b * (momentum == 0.0 ? 1.0 : (growth - momentum) / growth);
}

// The exponent along a vector of that Rayleigh quotient and squared secant ‖y‖²/‖q‖², under rate b.
LYAPCUDA_HOST_DEVICE inline double expected_exponent(double b, double rayleigh, double square) {
  return 0.5 * std::log(1.0 + (mul(mul(2.0, b), rayleigh) + mul(mul(b, b), square)));
}

LYAPCUDA_HOST_DEVICE inline bool all_finite(const double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

// What one pass tells of the map q → y.
struct Quotient {
  double rayleigh;  // ρ = q·y/‖q‖²
  double residual;  // r = ‖y − ρq‖/‖q‖
  double secant;    // ‖y‖/‖q‖, at most the largest |eigenvalue|
};

// Whether h is read off the growth λ; else off the quotients.
LYAPCUDA_HOST_DEVICE inline bool of_growth(Estimate estimate) {
  return estimate == Estimate::kGrowth || estimate == Estimate::kPaper;
}

struct Bar {
  double center, width;
};

// Whether h is read off one step alone, corrected outwards by what its residual says.
LYAPCUDA_HOST_DEVICE inline bool of_one_step(Estimate estimate) {
  return estimate == Estimate::kSchwarz || estimate == Estimate::kSecant ||
         estimate == Estimate::kOuter;
}

// r²/gap, at most r: by so much the Rayleigh quotient grows half a step on, in a map whose other
// end lies a gap away.
LYAPCUDA_HOST_DEVICE inline double half_step(double residual, double gap) {
  const double larger = gap > residual ? gap : residual;
  return larger > 0.0 ? mul(residual, residual / larger) : 0.0;
}

// √(a² + b²), of which no square overflows.
LYAPCUDA_HOST_DEVICE inline double length_of(double a, double b) {
  const double larger = std::fabs(a) > std::fabs(b) ? std::fabs(a) : std::fabs(b);
  if (larger == 0.0) return 0.0;
  a /= larger;
  b /= larger;
  return mul(larger, std::sqrt(mul(a, a) + mul(b, b)));
}

// The share of ‖y‖/‖q‖ from which on the outer end of the interval is taken.
constexpr double kSettled = 0.1;

// How far outwards of ρ the estimate lies.
//   Schwarz: s = y·y/(q·y) = ρ + r²/ρ.
//   secant: √(ρ·s) = √(ρ² + r²), by ρ + r²/(√(ρ² + r²) + ρ).
//   outer: towards the wanted end, whatever the sign of ρ. A descent has much of the bulk in q,
//   near the eigenvalue it looks for: all of r is then missing, as measured.
LYAPCUDA_HOST_DEVICE inline double beyond_rayleigh(double rayleigh, double residual,
                                                   const GrowthOptions& options) {
  const double size = std::fabs(rayleigh), secant = length_of(rayleigh, residual);
  if (options.estimate == Estimate::kOuter) {
    return mul(options.sign, half_step(residual, mul(kSettled, secant)));
  }
  if (!(size > 0.0)) return 0.0;
  const double gap = options.estimate == Estimate::kSecant ? size + secant : size;
  return std::copysign(half_step(residual, gap), rayleigh);
}

// The estimate of one step, and ‖y − hq‖/‖q‖: within so much of any h there is an eigenvalue.
LYAPCUDA_HOST_DEVICE inline Bar one_step_bar(double rayleigh, double residual,
                                             const GrowthOptions& options) {
  const double beyond = beyond_rayleigh(rayleigh, residual, options);
  const double ratio = residual > 0.0 ? beyond / residual : 0.0;
  return {rayleigh + beyond, mul(residual, std::sqrt(1.0 + mul(ratio, ratio)))};
}

// The error bar of a step, whose middle is h unless that is read off the growth.
//
// The mean over both sides of θ (but of the quotients of one step, which don't wait for the other
// side): one-sided errors of y, of odd order in Δq, cancel. They do so in ½(y − y') as well, whose
// residual is at most the mean of the two; what the quotients differ by is added for the case that
// q or the minibatch, not the side, is why.
LYAPCUDA_HOST_DEVICE inline Bar error_bar(double rayleigh, double residual, double previous,
                                          double previous_residual, const GrowthOptions& options) {
  const bool known = std::isfinite(previous);
  if (of_one_step(options.estimate)) {
    const Bar now = one_step_bar(rayleigh, residual, options);
    const Bar before = one_step_bar(previous, previous_residual, options);
    const double apart = known ? 0.5 * std::fabs(now.center - before.center) : 0.0;
    return {now.center, now.width + apart};
  }
  const double apart = known ? 0.5 * std::fabs(rayleigh - previous) : 0.0;
  if (!known || !options.alternate) return {rayleigh, residual + apart};
  return {mul(0.5, rayleigh + previous), mul(0.5, residual + previous_residual) + apart};
}

// x^1.2. (The pow of CUDA's own library has products that a compiler may fuse.)
LYAPCUDA_HOST_DEVICE inline double power(double x) { return std::exp(mul(1.2, std::log(x))); }

// What |h − h0| of the minibatch stays below nine times in ten, for the estimate that is the best
// for what it is read from, where `share` = r/(‖y‖/‖q‖) and `first` was that before further
// gradients. Fitted to 37 runs (docs/tracking.md says how well it holds on others): smooth ones by
// the residual left; with kinks by the first residual, as further gradients don't come nearer to
// the Hessian at θ.
LYAPCUDA_HOST_DEVICE inline double expected_error(double h, double share, double first,
                                                  bool refined, Estimate estimate) {
  if (estimate == Estimate::kSecant) {
    const double part = refined ? mul(0.85, power(first)) : mul(0.75, first);
    return mul(std::fabs(h), length_of(0.01, part));
  }
  const double left = refined ? share + mul(0.05, first) : share;
  const double part = mul(refined ? 1.7 : 2.0, power(left));
  return mul(std::fabs(h), length_of(0.005, part));
}

// The error of any h: that of the best estimate, and how far h is from it.
LYAPCUDA_HOST_DEVICE inline double error_of(double h, const Quotient& found, double first,
                                            bool refined, const GrowthOptions& options) {
  GrowthOptions best = options;
  if (!of_one_step(options.estimate)) best.estimate = Estimate::kSchwarz;
  const Bar bar = one_step_bar(found.rayleigh, found.residual, best);
  const double secant = length_of(found.rayleigh, found.residual);
  const double share = secant > 0.0 ? found.residual / secant : 0.0;
  const double apart = std::fabs(h - bar.center);
  if (best.estimate == Estimate::kOuter) {
    return apart + length_of(mul(0.005, bar.center), found.residual);
  }
  return apart + expected_error(bar.center, share, first, refined, best.estimate);
}

// How much of the bound an ascent keeps a step: h0 may fall while training goes on. A descent keeps
// all of it: there the bound is h0, which q must not come back to.
constexpr double kAscentMemory = 0.98;

// Whether a vector with this quotient had settled on the end of the spectrum that is not wanted.
LYAPCUDA_HOST_DEVICE inline bool on_unwanted_end(double rayleigh, double residual, double sign) {
  return rayleigh * sign < 0.0 && residual < std::fabs(rayleigh);
}

// What one quotient says of ‖H‖. A descent meets its largest eigenvalue only as a part of a
// mixture, and stays slow where it takes it for less than it is: |ρ| + r is up to √2 secants.
LYAPCUDA_HOST_DEVICE inline double norm_seen(const Quotient& found, double sign) {
  return sign > 0.0 ? found.secant : std::fabs(found.rayleigh) + found.residual;
}

// The rate for the next step: β·‖H‖ = e − 1, with ‖H‖ from the secants seen. The map then shrinks
// the unwanted end (|1 + βh| < 1 there). A secant met where q had settled on that end is kept for
// good: a rate that lets it outgrow the wanted end would bring q back to it.
//
// `seen` is the largest of this step, `settled` the largest met on the unwanted end (0: none).
LYAPCUDA_HOST_DEVICE inline void rate_of_secants(double& beta, double& bound, double& guard,
                                                 double seen, double settled, double sign) {
  if (!std::isfinite(seen) || !std::isfinite(kTargetGrowth / seen)) return;
  const double kept = (sign > 0.0 ? kAscentMemory : 1.0) * bound;
  bound = seen > kept ? seen : kept;
  if (settled > guard) guard = settled;
  beta = kTargetGrowth / (bound > guard ? bound : guard);
  if (beta > kLargestRate) beta = kLargestRate;
}

}  // namespace lyapcuda
