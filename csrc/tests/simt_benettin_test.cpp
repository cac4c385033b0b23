// benettin and benettin_refine in the emulator: a block gets the bits that one thread gets.
#include "../kernels/benettin.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

std::vector<double> panel_state(int k, double beta) {
  std::vector<double> state(panel_size(k), std::nan(""));
  const PanelFields at{state.data(), k};
  at(PanelScalar::perturbation) = 0.1;
  at(PanelScalar::beta) = beta;
  at(PanelScalar::bound) = 0.3;
  at(PanelScalar::guard) = at(PanelScalar::steps) = at(PanelScalar::skipped) = 0.0;
  at(PanelScalar::reseed) = at(PanelScalar::reseeds) = 0.0;
  at(PanelScalar::pending) = at(PanelScalar::again) = at(PanelScalar::accepted) = 0.0;
  return state;
}

// The Gram matrix of k rows a block: random ones, which are of full rank, carried first. `met`
// brings two of the separations together.
std::vector<double> some_gram(int k, int blocks, bool met) {
  const int rows = k * blocks, n = 3 * k + 7;
  std::vector<std::vector<double>> stack(rows, std::vector<double>(n));
  for (auto& row : stack) {
    for (double& entry : row) entry = 0.1 * random_number();
  }
  for (int j = 0; j < k && blocks > 1; ++j) {
    for (int e = 0; e < n; ++e) {
      stack[k + j][e] += stack[j][e] * (1.0 + j);
      if (blocks > 2) stack[2 * k + j][e] = stack[j][e] * (1.0 + 1e-3 * stack[2 * k + j][e]);
      if (blocks > 3) stack[3 * k + j][e] = stack[j][e] + 0.5 * stack[k + j][e];
    }
  }
  if (met) stack[k - 1] = stack[0];
  std::vector<double> gram(rows * rows, 0.0);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < rows; ++j) {
      for (int e = 0; e < n; ++e) gram[i * rows + j] += stack[i][e] * stack[j][e];
    }
  }
  return gram;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

bool step_right(Order order, const std::vector<double>& before, const std::vector<double>& gram,
                int k, const BenettinOptions& options, std::vector<double>* after = nullptr) {
  const double losses[2] = {1.0, 2.0};
  std::vector<double> expected = before, state = before, scratch(benettin_scratch(k));
  benettin_step(SoloTeam{}, expected.data(), gram.data(), losses, 2, k, options, scratch.data());
  simt::launch(1, kThreads, order, kernels::benettin, state.data(), gram.data(), losses, 2, k,
               options);
  if (after != nullptr) *after = state;
  return same(state, expected);
}

bool refine_right(Order order, const std::vector<double>& before, const std::vector<double>& gram,
                  int k) {
  std::vector<double> expected = before, state = before, scratch(benettin_scratch(k));
  benettin_refine(SoloTeam{}, expected.data(), gram.data(), k, scratch.data());
  simt::launch(1, kThreads, order, kernels::benettin_refine, state.data(), gram.data(), k);
  return same(state, expected);
}

BenettinOptions some_options(double sign, Estimate estimate, bool realised, double momentum,
                             bool rotate) {
  return {{sign, estimate, momentum, true, true, 0.9}, realised, rotate};
}

void steps() {
  for (const int k : {1, 2, 3, 5, 14, 32}) {
    for (const Order order : kOrders) {
      for (const bool realised : {false, true}) {
        const double sign = realised ? -1.0 : 1.0;
        std::vector<double> state = panel_state(k, 0.4);
        for (int step = 0; step < 2; ++step) {  // the second one is paired with the first
          const auto options =
              some_options(sign, step == 0 ? Estimate::kRayleigh : Estimate::kGrowth, realised,
                           realised ? 0.5 : 0.0, order == Order::kForward);
          std::vector<double> after;
          CHECK(
              step_right(order, state, some_gram(k, realised ? 4 : 2, false), k, options, &after));
          state = after;
        }
        const PanelFields at{state.data(), k};
        CHECK(at(PanelScalar::accepted) == 1.0 && at(PanelScalar::steps) == 2.0);
        CHECK(at(PanelScalar::pending) == 1.0);
        // The second pass, over what the first made nearly orthonormal.
        at(PanelScalar::again) = 1.0;
        std::vector<double> gram = some_gram(k, 1, false);
        for (double& entry : gram) entry *= 1e-3;
        for (int j = 0; j < k; ++j) gram[j * k + j] += 0.01;
        CHECK(refine_right(order, state, gram, k));
        at(PanelScalar::again) = 0.0;
        CHECK(refine_right(order, state, gram, k));
      }
    }
  }
}

void steps_that_do_not_count() {
  for (const Order order : kOrders) {
    const auto options = some_options(1.0, Estimate::kRayleigh, false, 0.0, true);
    const std::vector<double> before = panel_state(5, 0.4);
    std::vector<double> after, gram = some_gram(5, 2, true);
    CHECK(step_right(order, before, gram, 5, options, &after));
    gram = some_gram(5, 2, false);
    gram[17] = std::nan("");
    CHECK(step_right(order, before, gram, 5, options, &after));
    const PanelFields at{after.data(), 5};
    CHECK(at(PanelScalar::accepted) == 0.0 && at(PanelScalar::skipped) == 1.0);
  }
}

void faults_are_seen() {
  const auto options = some_options(1.0, Estimate::kRayleigh, false, 0.0, true);
  const std::vector<double> state = panel_state(14, 0.4), gram = some_gram(14, 2, false);
  int seen = 0, tried = 0;
  for (int barrier = 0; barrier < 40; barrier += 3, ++tried) {
    seen += sees_missing_barrier(
        barrier, [&](Order order) { return step_right(order, state, gram, 14, options); });
  }
  // A few guard what one warp does anyway, between phases of fewer than 32 entries.
  CHECK(seen * 2 > tried);
}

}  // namespace

void simt_benettin_tests() {
  steps();
  steps_that_do_not_count();
  faults_are_seen();
}

}  // namespace lyapcuda::test
