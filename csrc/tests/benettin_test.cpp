// The algebra of small matrices and the scalar mathematics of a panel's step (panel_algebra.h,
// benettin.h), within the scratch memory that they ask for.
#include "../benettin.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"

namespace lyapcuda::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
const int kCounts[] = {1, 2, 3, 4, 5, 14, 31, 32};

// Numbers in [−1, 1) that look random.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2 + 1) {}
  double operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state_ >> 11)) * 0x1p-52 - 1.0;
  }

 private:
  uint64_t state_;
};

struct Storage {
  explicit Storage(int k) : data(matrix_size(k), kNan), matrix{data.data(), matrix_stride(k)} {}
  std::vector<double> data;
  Matrix matrix;
};

void everybody_meets_everybody_once() {
  for (int players = 2; players <= 32; players += 2) {
    std::vector<int> met(players * players, 0);
    bool apart = true;
    for (int round = 0; round < players - 1; ++round) {
      std::vector<int> busy(players, 0);
      for (int slot = 0; slot < players / 2; ++slot) {
        int p, q;
        tournament_pair(players, round, slot, p, q);
        apart = apart && 0 <= p && p < q && q < players && busy[p]++ == 0 && busy[q]++ == 0;
        if (apart) ++met[p * players + q];
      }
    }
    CHECK(apart);
    for (int p = 0; p < players; ++p) {
      for (int q = p + 1; q < players; ++q) CHECK(met[p * players + q] == 1);
    }
  }
}

void symmetric_matrices_come_apart() {
  for (int k : kCounts) {
    for (int kind = 0; kind < 4; ++kind) {
      Numbers number(100 * k + kind);
      Storage a(k), z(k), kept(k);
      for (double& value : a.data) value = 0.0;
      for (int i = 0; i < k; ++i) {
        for (int j = 0; j <= i; ++j) {
          double value = number();
          if (kind == 1) value *= std::pow(10.0, -i - j);       // graded
          if (kind == 2) value = i == j ? 3.0 : 1e-14 * value;  // nearly a multiple of 1
          if (kind == 3) value = (i + j) % 2 == 1 ? 1.0 : 0.0;  // clusters, a zero diagonal
          a.matrix(i, j) = a.matrix(j, i) = value;
        }
      }
      kept.data = a.data;
      std::vector<double> rotations(3 * (even(k) / 2) + k + 2, kNan);
      double* const next = rotations.data();
      const int pairs = even(k) / 2;
      eigen(SoloTeam{}, k, a.matrix, z.matrix,
            {next, next + pairs, next + 2 * pairs, next + 3 * pairs, next + 3 * pairs + k});
      double size = 0.0;
      for (double value : kept.data) size = std::fmax(size, std::fabs(value));
      const double allowed = 4e-16 * k * size * k;
      bool exact = true, orthogonal = true;
      for (int i = 0; i < k; ++i) {
        for (int j = 0; j < k; ++j) {
          double sum = -z.matrix(i, j) * a.matrix(j, j), product = i == j ? -1.0 : 0.0;
          for (int p = 0; p < k; ++p) {
            sum += kept.matrix(i, p) * z.matrix(p, j);
            product += z.matrix(p, i) * z.matrix(p, j);
          }
          exact = exact && std::fabs(sum) <= allowed;
          orthogonal = orthogonal && std::fabs(product) <= 1e-15 * k + 1e-15;
        }
      }
      CHECK(exact);
      CHECK(orthogonal);
    }
  }
}

void factors_and_solutions_multiply_back() {
  for (int k : kCounts) {
    Numbers number(k);
    Storage b(k), l(k), x(k), y(k), z(k);
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        x.matrix(i, j) = number();
        y.matrix(i, j) = z.matrix(i, j) = x.matrix(i, j);
      }
    }
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        b.matrix(i, j) = i == j ? 1.0 : 0.0;
        for (int p = 0; p < k; ++p) b.matrix(i, j) += x.matrix(i, p) * x.matrix(j, p);
      }
    }
    const Storage right = x;
    CHECK(cholesky(SoloTeam{}, k, b.matrix, l.matrix, 0.0) == k);
    solve_left(SoloTeam{}, k, l.matrix, x.matrix);
    solve_left_transposed(SoloTeam{}, k, l.matrix, y.matrix);
    solve_right(SoloTeam{}, k, l.matrix, z.matrix);
    bool same = true;
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        double factor = 0.0, left = 0.0, transposed = 0.0, other = 0.0;
        for (int p = 0; p <= std::min(i, j); ++p) factor += l.matrix(i, p) * l.matrix(j, p);
        for (int p = 0; p <= i; ++p) left += l.matrix(i, p) * x.matrix(p, j);
        for (int p = i; p < k; ++p) transposed += l.matrix(p, i) * y.matrix(p, j);
        for (int p = 0; p <= j; ++p) other += z.matrix(i, p) * l.matrix(j, p);
        const double expected = right.data[i * matrix_stride(k) + j];
        same = same && std::fabs(factor - b.matrix(i, j)) <= 1e-13 * k;
        same = same && std::fabs(left - expected) <= 1e-12;
        same = same && std::fabs(transposed - expected) <= 1e-12;
        same = same && std::fabs(other - expected) <= 1e-12;
      }
    }
    CHECK(same);
    b.matrix(k - 1, k - 1) = -1.0;
    CHECK(cholesky(SoloTeam{}, k, b.matrix, l.matrix, 0.0) < k);
    b.matrix(k - 1, k - 1) = kNan;
    CHECK(cholesky(SoloTeam{}, k, b.matrix, l.matrix, 0.0) < k);
  }
}

// A panel of eigenvectors with norm 0.1, and its state.
struct Step {
  explicit Step(int count, double beta, bool realised = false, bool heavy = false)
      : k(count),
        blocks(2 + realised + heavy),
        state(panel_size(k), kNan),
        gram(blocks * k * blocks * k, 0.0),
        scratch(benettin_scratch(k), kNan) {
    for (int64_t i = 0; i < panel_offset(PanelScalar::kCount); ++i) state[i] = 0.0;
    at(PanelScalar::perturbation) = 0.1;
    at(PanelScalar::beta) = beta;
    for (int i = 0; i < k; ++i) {
      std::vector<double> parts = {1.0, h(i)};
      if (realised) parts.push_back(1.0);
      if (heavy) parts.push_back(1.0 + beta * h(i));
      for (int a = 0; a < blocks; ++a) {
        for (int b = 0; b < blocks; ++b) entry(a, i, b, i) = 0.01 * parts[a] * parts[b];
      }
    }
  }
  double h(int i) const { return 5.0 - i; }
  double& entry(int a, int i, int b, int j) { return gram[(a * k + i) * blocks * k + b * k + j]; }
  double& at(PanelScalar field) { return state[panel_offset(field)]; }
  double& at(PanelVector field, int i) { return state[panel_offset(field, k) + i]; }
  double& at(PanelMatrix field, int i, int j) { return state[panel_offset(field, k) + i * k + j]; }
  void run(const BenettinOptions& options) {
    const double losses[2] = {1.0, 2.0};
    benettin_step(SoloTeam{}, state.data(), gram.data(), losses, 2, k, options, scratch.data());
  }

  int k, blocks;
  std::vector<double> state, gram, scratch;
};

BenettinOptions options_of(bool realised = false, double momentum = 0.0, bool rotate = true) {
  return {{1.0, Estimate::kRayleigh, momentum, true, true, 0.0}, realised, rotate};
}

void steps_take_or_refuse() {
  for (int k : kCounts) {
    for (bool realised : {false, true}) {
      for (double momentum : {0.0, 0.5}) {
        for (bool rotate : {false, true}) {
          Step step(k, 0.01, realised, momentum > 0.0);
          step.run(options_of(realised, momentum, rotate));
          CHECK(step.at(PanelScalar::accepted) == 1.0 && step.at(PanelScalar::pending) == 1.0);
          bool right = true;
          for (int i = 0; i < k; ++i) {
            const double h = step.h(i), growth = 1.0 + 0.01 * h;
            right = right && near(step.at(PanelVector::rayleigh, i), h, 1e-13) &&
                    step.at(PanelVector::residual, i) <= 1e-6 &&
                    near(step.at(PanelVector::exponent, i), std::log(growth), 1e-12);
            for (int j = 0; j < k; ++j) {
              const double wanted = i == j ? -1.0 / growth : 0.0;
              right = right && std::fabs(step.at(PanelMatrix::transform, i, j) - wanted) <= 1e-14;
            }
          }
          CHECK(right);
        }
      }
    }
  }
  for (double bad : {kNan, kInf}) {
    Step step(3, 0.01);
    step.run(options_of());
    const std::vector<double> before = step.state;
    step.entry(0, 1, 1, 2) = bad;
    step.run(options_of());
    CHECK(step.at(PanelScalar::accepted) == 0.0 && step.at(PanelScalar::skipped) == 1.0);
    for (PanelScalar field : {PanelScalar::accepted, PanelScalar::pending, PanelScalar::skipped}) {
      step.at(field) = before[panel_offset(field)];
    }
    CHECK(step.state == before);
  }
}

void overflow_is_refused() {
  for (bool heavy : {false, true}) {
    Step step(2, 0.01, false, heavy);
    refuse_overflow(step.gram.data(), 2, false, heavy, 0.01, 1e30);
    CHECK(std::isfinite(step.entry(1, 0, 1, 0)) && std::isfinite(step.entry(1, 1, 1, 1)));
    const int block = heavy ? 2 : 1;
    step.entry(block, 1, block, 1) = 1e66;  // d is 1e31 or more
    refuse_overflow(step.gram.data(), 2, false, heavy, 0.01, 1e30);
    CHECK(std::isfinite(step.entry(1, 0, 1, 0)) && std::isinf(step.entry(1, 1, 1, 1)));
  }
}

void second_passes_correct_the_first() {
  for (int k : kCounts) {
    Step step(k, 0.01);
    step.run(options_of());
    step.at(PanelScalar::again) = 1.0;
    const double exponent = step.at(PanelVector::exponent, k - 1);
    std::vector<double> gram(k * k, 0.0);
    for (int i = 0; i < k; ++i) gram[i * k + i] = 0.01;
    gram[k * k - 1] = 0.0121;
    benettin_refine(SoloTeam{}, step.state.data(), gram.data(), k, step.scratch.data());
    CHECK(step.at(PanelScalar::again) == 0.0 && step.at(PanelScalar::pending) == 1.0);
    CHECK(near(step.at(PanelMatrix::transform, k - 1, k - 1), 1 / 1.1, 1e-14));
    CHECK(near(step.at(PanelVector::exponent, k - 1), exponent + std::log(1.1), 1e-13));
    step.at(PanelScalar::again) = 1.0;
    gram[0] = 0.0;
    benettin_refine(SoloTeam{}, step.state.data(), gram.data(), k, step.scratch.data());
    CHECK(step.at(PanelScalar::again) == 0.0 && step.at(PanelScalar::pending) == 0.0);
  }
}

}  // namespace

void benettin_tests() {
  everybody_meets_everybody_once();
  symmetric_matrices_come_apart();
  factors_and_solutions_multiply_back();
  steps_take_or_refuse();
  overflow_is_refused();
  second_passes_correct_the_first();
}

}  // namespace lyapcuda::test
