// lyapunov_step in the emulator: a cooperative launch against ascent, exponent and recenter in
// turn.
#include "../kernels/exponent.cuh"
#include "../kernels/lyapunov_step.cuh"
#include "../kernels/recenter.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

struct Outcome {
  bool committed = false, same_scale = false;
};

template <class T, class P, bool kRealised>
struct StepCase {
  static constexpr double kDecay = 0.05;

  const Layout layout;
  std::vector<double> state = some_state();
  Walled<T> q;
  Tensors<P> g0, g1, theta;
  double losses[2] = {1.0, 2.0};
  ExponentOptions options{-1.0, Estimate::kGrowth, 0.0, true, true, 0.9};

  // What the three kernels make of it.
  std::vector<double> expected_state;
  Walled<T> expected_q;
  Tensors<P> expected;

  explicit StepCase(const Layout& of)
      : layout(of),
        q(of.total, of.shift, 64),
        g0(of, true),
        g1(of, true),
        theta(of, true),
        expected_q(of.total, 0, 64),
        expected(of, false) {
    randomise(q);
    three();
  }

  void three() {
    constexpr unsigned kGrid = 2;
    Walled<T> d(layout.total, 0, 0);
    std::vector<double> rows;
    const P* const* const lists[3] = {g0.const_list(), g1.const_list(), theta.const_list()};
    kernels::for_each_table(
        lists, layout.sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
          const size_t filled = rows.size();
          rows.resize(filled + kGrid * kSumSize, std::nan(""));
          simt::launch(
              kGrid, kThreads, Order::kForward, kernels::ascent<T, P, kRealised, false>, table,
              kernels::AscentArguments<T>{d.data(), q.data(), nullptr, nullptr, state.data(),
                                          options.sign, kDecay, 0.0, rows.data() + filled});
        });
    double sums[kSumSize];
    simt::launch(1, kThreads, Order::kForward, kernels::ascent_finish<T>, rows.data(),
                 static_cast<int64_t>(rows.size() / kSumSize), &sums[0]);
    expected_state = state;
    simt::launch(1, 32, Order::kForward, kernels::exponent, expected_state.data(), &sums[0],
                 &losses[0], int64_t{2}, options);
    const Walled<T>& from = expected_state[k_committed] != 0.0 ? d : q;
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        expected_q[layout.offsets[s] + i] = from[layout.offsets[s] + i];
      }
    }
    std::vector<double> take = expected_state;
    take[k_committed] = 1.0;  // what recenter is to keep is already in place
    P* const* const targets[2] = {expected.list(), theta.list()};
    kernels::for_each_table(
        targets, layout.sizes.data(), layout.offsets.data(), layout.count(),
        [&](const auto& table) {
          simt::launch(kGrid, kThreads, Order::kForward, kernels::recenter<T, P>, table,
                       kernels::RecenterArguments<T>{expected_q.data(), q.data(), take.data()});
        });
  }

  // The one kernel.
  void one(unsigned grid, Order order, std::vector<double>& after, Walled<T>& separation,
           Tensors<P>& gradient, Tensors<P>& copy, int64_t lie) {
    std::vector<int64_t> sizes = layout.sizes;
    sizes.back() += lie;
    after = state;
    P* const* const lists[4] = {copy.list(), g0.list(), gradient.list(), theta.list()};
    std::vector<double> rows(grid * kSumSize, std::nan(""));
    kernels::for_each_table(
        lists, sizes.data(), layout.offsets.data(), layout.count(),
        [&](const auto& table) {
          CHECK(kernels::step_fits<T, P>(table.first_chunk[table.count], grid));
          simt::launch_cooperative(
              grid, kThreads, order, kernels::lyapunov_step<T, P, kRealised>, table,
              kernels::StepArguments<T>{separation.data(), after.data(), &losses[0], 2, options,
                                        kDecay, rows.data()});
        },
        kernels::kStepChunk<P>);
  }

  // With θ1 in g1's memory where `over`. d to the bit; the numbers of the state, and θ1 where the
  // scale came out the same, too.
  bool right(unsigned grid, Order order, bool over, std::vector<double>& after, int64_t lie = 0,
             Outcome* outcome = nullptr) {
    Walled<T> now(layout.total, layout.shift, 64);
    Tensors<P> copy(layout, false), gradient(layout, false);
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        gradient.pointers[s][i] = g1[s][i];
        now[layout.offsets[s] + i] = q[layout.offsets[s] + i];
      }
    }
    Tensors<P>& written = over ? gradient : copy;
    one(grid, order, after, now, gradient, written, lie);
    bool right = layout.gaps_untouched(now) && now.whole() && copy.whole() && gradient.whole() &&
                 theta.whole() && g0.whole();
    for (int f = 0; f < kStateSize; ++f) {
      const double a = after[f], b = expected_state[f];
      right = right && (near(a, b, 1e-9) || (std::isnan(a) && std::isnan(b)));
    }
    const T scale = static_cast<T>(after[k_scale]);
    const bool same_scale = scale == static_cast<T>(expected_state[k_scale]);
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        const P moved = stored_as<P>(value_of<T>(theta[s][i]) + expected_q[at] * scale);
        right = right && std::memcmp(&now[at], &expected_q[at], sizeof(T)) == 0 &&
                std::memcmp(&written[s][i], &moved, sizeof(P)) == 0 &&
                (!same_scale || std::memcmp(&written[s][i], &expected[s][i], sizeof(P)) == 0);
      }
    }
    if (outcome != nullptr) *outcome = {after[k_committed] != 0.0, same_scale};
    return right;
  }

  void check(const std::vector<unsigned>& grids) {
    for (const unsigned grid : grids) {
      std::vector<double> forward, reverse;
      CHECK(right(grid, Order::kForward, false, forward));
      CHECK(right(grid, Order::kReverse, true, reverse));
      CHECK(std::memcmp(forward.data(), reverse.data(), sizeof(double) * kStateSize) == 0);
    }
  }
};

template <class T, class P, bool kRealised>
void cases() {
  using Case = StepCase<T, P, kRealised>;
  for (const auto& sizes : size_lists()) {
    const bool several = sizes.size() > 1 || sizes[0] > 1000;
    for (const int64_t shift : {0, 1}) {
      // (Every tensor takes a chunk at least: sixteen don't fit fewer blocks.)
      Case(Layout(sizes, shift)).check(several ? std::vector<unsigned>{4, 9} : std::vector{2u});
    }
  }
  std::vector<double> after;
  for (const Order order : kOrders) {
    Case of(Layout({257, 31, 1030}, 0));
    Outcome outcome;
    CHECK(of.right(3, order, false, after, 0, &outcome) && outcome.committed);
    // A step that does not count, and one where the copies met: q stays, θ1 is written from it.
    of.losses[1] = std::nan("");
    of.three();
    CHECK(of.right(3, order, true, after, 0, &outcome) && !outcome.committed &&
          outcome.same_scale && after[k_skipped] == 1.0);
    of.losses[1] = 2.0;
    of.state[k_beta] = 0.0;
    of.state[k_scale] = 1e-30;
    of.three();
    CHECK(of.right(3, order, false, after, 0, &outcome));
  }
}

template <class T, class P>
void storage_cases() {
  cases<T, P, false>();
  cases<T, P, true>();
}

void a_block_holds_so_much() {
  using kernels::BFloat16;
  static_assert(kernels::step_capacity<float, float>(1) == 11 * 1024);
  static_assert(kernels::step_capacity<double, double>(1) == 11 * 512);
  static_assert(kernels::step_capacity<float, BFloat16>(2) == 2 * 5 * 2048);
  CHECK(kernels::step_fits<float, float>(11, 1) && !kernels::step_fits<float, float>(12, 1));
  CHECK(kernels::step_fits<float, float>(int64_t{11} * 528, 528));
  // Every element that fits, in the one block.
  StepCase<float, float, false>(Layout({11 * 1024}, 0)).check({1});
  StepCase<double, double, true>(Layout({11 * 512 - 3}, 0)).check({1});
}

// Barriers: 0 within the block's first sum, 1 that of the grid, 2 within the second sum, 3 before
// the new scale is read.
void faults_are_seen() {
  StepCase<float, float, false> of(Layout({40, 3000}, 0));
  std::vector<double> after;
  for (const int barrier : {0, 1, 2, 3}) {
    CHECK(sees_missing_barrier(barrier,
                               [&](Order order) { return of.right(2, order, false, after); }));
  }
  for (const int64_t lie : {-1, 1}) CHECK(!of.right(2, Order::kForward, false, after, lie));
}

}  // namespace

void simt_step_tests() {
  storage_cases<float, float>();
  storage_cases<float, kernels::BFloat16>();
  storage_cases<float, kernels::Half>();
  storage_cases<double, double>();
  a_block_holds_so_much();
  faults_are_seen();
}

}  // namespace lyapcuda::test
