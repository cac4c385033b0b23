// The kernels of the steps with k curvatures in the emulator, against plain loops.
#include "../kernels/panel_descend.cuh"
#include "../kernels/panel_slopes.cuh"
#include "../kernels/project.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

std::vector<double> some_panel_state(int k) {
  std::vector<double> state(panel_size(k), 0.0);
  state[panel_offset(PanelScalar::perturbation)] = 0.7;
  state[panel_offset(PanelScalar::accepted)] = state[panel_offset(PanelScalar::pending)] = 1.0;
  for (int j = 0; j < k; ++j) {
    state[panel_offset(PanelVector::h_ema, k) + j] = 9.0 / (j + 1);
    state[panel_offset(PanelVector::residual, k) + j] = 0.1;
    for (int i = 0; i < k; ++i) {
      state[panel_offset(PanelMatrix::transform, k) + i * k + j] = random_number();
    }
  }
  return state;
}

template <class T, class P, Momentum kMomentum>
struct Case {
  Layout layout;
  int k;
  std::vector<double> state;
  Tensors<P> before, gradient;
  Walled<T> held;
  Panel<T> panel;
  std::vector<double> slopes;

  Case(const Layout& of, int rows)
      : layout(of),
        k(rows),
        state(some_panel_state(rows)),
        before(of, true),
        gradient(of, true),
        held(of.total, 0, 64),
        panel(rows, of.total, of.shift, 64),
        slopes(rows) {
    randomise(held);
    randomise(panel.array);
    for (double& slope : slopes) slope = random_number();
  }

  T direction(int64_t s, int64_t i, T& buffer, bool advance) const {
    const T decay = static_cast<T>(0.05), heavy = static_cast<T>(0.3);
    const T g = value_of<T>(gradient[s][i]) + value_of<T>(before[s][i]) * decay;
    if (kMomentum == Momentum::kNone) return g;
    if (advance) buffer = buffer * heavy + g;
    return kMomentum == Momentum::kHeavy ? buffer : g + buffer * heavy;
  }

  template <class Arguments>
  void launch(unsigned grid, Order order, Tensors<P>& theta, int64_t chunk, int64_t lie,
              void (*kernel)(kernels::DirectionSegments<P>, Arguments), const Arguments& arguments,
              std::vector<double>* rows) {
    std::vector<int64_t> sizes = layout.sizes;
    if (!sizes.empty()) sizes.back() += lie;
    P* const* const lists[2] = {theta.list(), gradient.list()};
    kernels::for_each_table(
        lists, sizes.data(), layout.offsets.data(), layout.count(),
        [&](const kernels::DirectionSegments<P>& table) {
          Arguments here = arguments;
          if constexpr (std::is_same_v<Arguments, kernels::PanelSlopesArguments<T>>) {
            const size_t filled = rows->size();
            rows->resize(filled + grid * k, std::nan(""));
            here.partial = rows->data() + filled;
          }
          simt::launch(grid, kThreads, order, kernel, table, here);
        },
        chunk);
  }

  bool slopes_right(unsigned grid, Order order, const double* factor = nullptr, int64_t lie = 0) {
    Walled<T> buffer(layout.total, 0, 64), expected(layout.total, 0, 64);
    std::memcpy(buffer.data(), held.data(), layout.total * sizeof(T));
    std::memcpy(expected.data(), held.data(), layout.total * sizeof(T));
    std::vector<double> rows, out(k, std::nan(""));
    rows.reserve(4096 * k);
    kernels::with_rows<16, 33>(k + 1, [&](auto most) {
      launch(grid, order, before, kernels::kSlopesLength<T, most()>, lie,
             kernels::panel_slopes<T, P, kMomentum, most()>,
             kernels::PanelSlopesArguments<T>{panel.data(), layout.total, k, buffer.data(),
                                              state.data(), factor, 0.05, 0.3, nullptr},
             &rows);
    });
    simt::launch(kernels::project_finish_blocks(k - 1), kThreads, order, kernels::project_finish,
                 rows.data(), static_cast<int64_t>(rows.size() / k), k - 1, out.data());
    const Newton newton{state.data(), k, 1.0, 1.0};
    const bool go = newton.go(factor_of(factor));
    std::vector<Sum> sums(k);
    for (int64_t s = 0; go && s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        const T u = direction(s, i, expected[at], true);
        for (int j = 0; j < k && newton.has_vectors(); ++j) sums[j].add(panel.at(j, at), u);
      }
    }
    bool right = same_bits(buffer, expected) && buffer.whole() && before.whole();
    for (int j = 0; j < k; ++j) right = right && sums[j].near(out[j]);
    return right;
  }

  bool step_right(unsigned grid, Order order, const double* factor = nullptr, int64_t lie = 0) {
    Tensors<P> theta(layout, false);
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) theta.pointers[s][i] = before[s][i];
    }
    std::vector<double> used(k + 1, -1.0);
    const kernels::PanelDescendArguments<T> arguments{
        panel.data(), layout.total, k,   held.data(), state.data(), slopes.data(),
        factor,       1.5,          7.5, 0.05,        0.3,          used.data()};
    launch(grid, order, theta, kernels::kChunk<P>, lie, kernels::panel_descend<T, P, kMomentum>,
           arguments, nullptr);
    const Newton newton{state.data(), k, 1.5 * factor_of(factor), 7.5};
    const bool go = newton.go(factor_of(factor)) && all_finite(slopes.data(), k);
    bool right = true;
    for (int j = 0; j <= k; ++j) right = right && used[j] == (go ? newton.rate(j) : 0.0);
    const int rows = newton.has_vectors() ? k : 0;
    std::vector<double> along(k);
    std::vector<T> weights(k);
    for (int j = 0; j < rows; ++j) along[j] = newton.along(slopes.data(), j);
    for (int i = 0; i < rows; ++i) weights[i] = static_cast<T>(newton.weight(along.data(), i));
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        T here = value_of<T>(before[s][i]), unchanged = held[at];
        here = here - direction(s, i, unchanged, false) * static_cast<T>(newton.rate(k));
        for (int j = 0; j < rows; ++j) here = here - panel.at(j, at) * weights[j];
        const P out = go ? stored_as<P>(here) : before[s][i];
        right = right && std::memcmp(&theta[s][i], &out, sizeof(P)) == 0;
      }
    }
    return right && theta.whole() && gradient.whole() && panel.array.whole() && held.whole();
  }
};

template <class T, class P, Momentum kMomentum>
void cases_of() {
  const double nan = std::nan(""), factor = 0.5;
  for (const Order order : kOrders) {
    for (const auto& sizes : size_lists()) {
      for (const int64_t shift : {0, 1}) {
        Case<T, P, kMomentum> few(Layout(sizes, shift), 3);
        CHECK(few.slopes_right(3, order));
        CHECK(few.step_right(3, order));
      }
    }
    for (const int k : {1, 2, 8, 9, 32}) {
      Case<T, P, kMomentum> many(Layout({257, 5, 0, 33}, 0), k);
      CHECK(many.slopes_right(2, order, &factor));
      CHECK(many.step_right(2, order, &factor));
    }
    Case<T, P, kMomentum> none(Layout({}, 0), 2), small(Layout({257, 5}, 0), 5);
    CHECK(none.slopes_right(1, order) && none.step_right(1, order));
    CHECK(small.slopes_right(2, order, &nan) && small.step_right(2, order, &nan));
    small.state[panel_offset(PanelScalar::pending)] = 0.0;
    CHECK(small.slopes_right(2, order) && small.step_right(2, order));
    small.slopes[1] = nan;
    CHECK(small.step_right(2, order));
    small.state[panel_offset(PanelScalar::accepted)] = 0.0;
    CHECK(small.slopes_right(2, order) && small.step_right(2, order));
  }
}

void faults_are_seen() {
  Case<float, float, Momentum::kHeavy> small(Layout({400, 257}, 0), 5);
  for (const int barrier : {0, 1}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return small.slopes_right(1, order); }));
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return small.step_right(1, order); }));
  }
  for (const int64_t lie : {-1, 1}) {
    CHECK(!small.slopes_right(1, Order::kForward, nullptr, lie));
    CHECK(!small.step_right(1, Order::kForward, nullptr, lie));
  }
}

template <class T, class P>
void storage_cases() {
  cases_of<T, P, Momentum::kNone>();
  cases_of<T, P, Momentum::kHeavy>();
  cases_of<T, P, Momentum::kNesterov>();
}

}  // namespace

void simt_quasi_newton_tests() {
  storage_cases<float, float>();
  storage_cases<float, kernels::BFloat16>();
  storage_cases<float, kernels::Half>();
  storage_cases<double, double>();
  faults_are_seen();
}

}  // namespace lyapcuda::test
