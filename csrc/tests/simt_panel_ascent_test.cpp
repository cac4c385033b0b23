// panel_ascent, its check and gram_finish in the emulator, against plain loops.
#include "../kernels/gram_finish.cuh"
#include "../kernels/panel_ascent.cuh"

#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

template <class T, class P, bool kRealised, bool kMomentum>
struct PanelAscentCase {
  static constexpr double kSign = -1.0, kDecay = 0.05, kMomentumValue = 0.9, kBeta = 0.81;
  static constexpr int kStack = 2 + kRealised + kMomentum;
  // Half differs from BFloat16 in its conversions alone: its larger kernels only cost compile time.
  static constexpr int kMostRows = std::is_same_v<P, kernels::Half> ? 32 : kStack == 2 ? 64 : 128;

  const Layout layout;
  const int k;
  Panel<T> q, p;
  Panel<P> g1;
  Tensors<P> g0, theta;
  Panel<T> expected_d, expected_w;
  std::vector<Sum> expected;

  PanelAscentCase(const Layout& of, int separations)
      : layout(of),
        k(separations),
        q(k, of.total, 0, 0),
        p(k, of.total, of.shift, 64),
        g1(k, of.total, 0, 0),
        g0(of, true),
        theta(of, true),
        expected_d(k, of.total, 0, 0),
        expected_w(k, of.total, 0, 0) {
    randomise(q.array);
    randomise(p.array);
    randomise(g1.array);
    expected.resize(kStack * k * kStack * k);
    std::vector<double> column(kStack * k);
    const T rate = static_cast<T>(kSign * kBeta), decay = static_cast<T>(kDecay);
    const T momentum = static_cast<T>(kMomentumValue);
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        const T here = value_of<T>(theta[s][i]);
        for (int j = 0; j < k; ++j) {
          const T carried = q.at(j, at);
          T moved = carried;
          if (kRealised) moved = value_of<T>(stored_as<P>(here + carried)) - here;
          const T y = (value_of<T>(g1.at(j, at)) - value_of<T>(g0[s][i])) + decay * moved;
          const T w = kMomentum ? momentum * p.at(j, at) + y : y;
          const T d = carried + rate * w;
          expected_d.at(j, at) = d;
          expected_w.at(j, at) = w;
          column[j] = carried;
          column[k + j] = y;
          if (kRealised) column[2 * k + j] = moved;
          if (kMomentum) column[(kStack - 1) * k + j] = d;
        }
        for (int a = 0; a < kStack * k; ++a) {
          for (int b = 0; b < kStack * k; ++b)
            expected[a * kStack * k + b].add(column[a], column[b]);
        }
      }
    }
  }

  // The sizes of segments handed to the kernel may be wrong by `lie`.
  template <int kRows>
  std::vector<double> run_rows(unsigned grid, Order order, T* d, T* p_next, int64_t lie) {
    const int rows = kStack * k, pairs = kernels::symmetric_pairs(rows);
    const double beta = kBeta;
    std::vector<int64_t> sizes = layout.sizes;
    sizes.back() += lie;
    std::vector<double> partial;
    const P* const* const lists[2] = {g0.const_list(), theta.const_list()};
    kernels::for_each_table(
        lists, sizes.data(), layout.offsets.data(), layout.count(),
        [&](const auto& table) {
          const size_t filled = partial.size();
          partial.resize(filled + grid * kernels::gram_row(pairs), std::nan(""));
          simt::launch(
              grid, kernels::panel_threads(kRows), order,
              kernels::panel_ascent<T, P, kRealised, kMomentum, kRows>, table,
              kernels::PanelAscentArguments<T, P>{
                  d, q.data(), g1.data(), p.data(), p_next, layout.total, k, &beta, kSign,
                  static_cast<T>(kDecay), static_cast<T>(kMomentumValue), partial.data() + filled});
        },
        kernels::kPanelLength<T, kRows>);
    std::vector<double> out(rows * rows, std::nan(""));
    simt::launch(kernels::gram_finish_blocks(pairs), kThreads, order, kernels::gram_finish,
                 partial.data(), static_cast<int64_t>(partial.size()) / kernels::gram_row(pairs),
                 kernels::GramShape{rows, rows, true}, out.data(), nullptr);
    return out;
  }
  std::vector<double> run(unsigned grid, Order order, T* d, T* p_next, int64_t lie = 0) {
    std::vector<double> out;
    const auto with = [&](auto most) { out = run_rows<most()>(grid, order, d, p_next, lie); };
    if constexpr (kMostRows == 32) {
      kernels::with_rows<16, 32>(kStack * k, with);
    } else if constexpr (kMostRows == 64) {
      kernels::with_rows<16, 32, 64>(kStack * k, with);
    } else {
      kernels::with_rows<16, 32, 64, 128>(kStack * k, with);
    }
    return out;
  }

  bool sums_right(const std::vector<double>& gram) const {
    const int rows = kStack * k;
    for (int a = 0; a < rows; ++a) {
      for (int b = 0; b < rows; ++b) {
        if (!expected[a * rows + b].near(gram[a * rows + b])) return false;
        if (gram[a * rows + b] != gram[b * rows + a]) return false;
      }
    }
    return true;
  }
  bool elements_right(const Panel<T>& d, const Panel<T>& expectation) const {
    for (int j = 0; j < k; ++j) {
      for (int64_t s = 0; s < layout.count(); ++s) {
        if (std::memcmp(&d.at(j, layout.offsets[s]), &expectation.at(j, layout.offsets[s]),
                        layout.sizes[s] * sizeof(T)) != 0) {
          return false;
        }
      }
    }
    return true;
  }
  bool right(unsigned grid, Order order, std::vector<double>& gram, int64_t lie = 0) {
    Panel<T> d(k, layout.total, 2 * layout.shift, 64), next(k, layout.total, 3 * layout.shift, 64);
    gram = run(grid, order, d.data(), next.data(), lie);
    return elements_right(d, expected_d) && d.gaps_untouched(layout) && sums_right(gram) &&
           (kMomentum ? elements_right(next, expected_w) && next.gaps_untouched(layout)
                      : next.array.untouched(0, k * layout.total)) &&
           q.array.whole() && p.array.whole() && g1.array.whole() && g0.whole() && theta.whole();
  }

  void check(const std::vector<unsigned>& grids) {
    for (const unsigned grid : grids) {
      std::vector<double> forward, reverse;
      CHECK(right(grid, Order::kForward, forward));
      CHECK(right(grid, Order::kReverse, reverse));
      CHECK(forward == reverse);
    }
  }

  // d = q, d = g1: every element is read before it is written.
  void check_in_place() {
    Panel<T> next(k, layout.total, 0, 0);
    CHECK(sums_right(run(2, Order::kReverse, q.data(), next.data())));
    CHECK(elements_right(q, expected_d));
  }
  void check_over_gradient() {
    Panel<T> next(k, layout.total, 0, 0);
    if constexpr (sizeof(T) == sizeof(P)) {
      CHECK(sums_right(run(2, Order::kForward, g1.data(), next.data())));
      CHECK(elements_right(g1, expected_d));
    }
  }
};

template <class T, class P, bool kRealised, bool kMomentum>
void cases() {
  using Case = PanelAscentCase<T, P, kRealised, kMomentum>;
  // Every alignment of the tensors; whole tiles of every length beside tails.
  for (const int64_t shift : {0, 1}) {
    Case(Layout({0, 1, 31, 33, 255, 257, 40, 41}, shift), 3).check({2});
    if (Case::kMostRows > 32) Case(Layout({300}, shift), 14).check({1});
  }
  for (const int64_t n : {1, 31, 33, 255}) Case(Layout({n}, 0), 2).check({1});
  for (const int k : {1, 5, 8, 16, 17, 32}) {
    if (Case::kStack * k <= Case::kMostRows) Case(Layout({128, 130}, 0), k).check({1});
  }
  Case(Layout({257, 128}, 0), 5).check_in_place();
  Case(Layout({257, 128}, 0), 5).check_over_gradient();
}

template <class T, class P>
void storage_cases() {
  cases<T, P, false, false>();
  cases<T, P, false, true>();
  cases<T, P, true, false>();
  cases<T, P, true, true>();
}

void large_and_many() {
  PanelAscentCase<float, float, false, false>(Layout({4097, 1024}, 0), 14).check({1, 3, 50});
  PanelAscentCase<float, kernels::BFloat16, true, true>(Layout({4097}, 0), 2).check({1, 7});
  PanelAscentCase<float, float, true, false>(Layout({640}, 0), 14).check({3});
  PanelAscentCase<float, float, true, true>(Layout({320}, 0), 21).check({2});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 150; ++i) sizes.push_back(i % 11);
  PanelAscentCase<float, float, false, false>(Layout(sizes, 0), 3).check({3});
}

void faults_are_seen() {
  PanelAscentCase<float, float, false, false> ahead(Layout({40, 520}, 0), 14);
  PanelAscentCase<float, float, false, true> larger(Layout({300}, 0), 14);
  PanelAscentCase<float, float, true, true> largest(Layout({200}, 0), 20);
  std::vector<double> gram;
  for (const int barrier : {0, 1, 2, 3}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return ahead.right(1, order, gram); }));
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return larger.right(1, order, gram); }));
    CHECK(
        sees_missing_barrier(barrier, [&](Order order) { return largest.right(1, order, gram); }));
  }
  for (const int64_t lie : {-1, 1}) CHECK(!ahead.right(1, Order::kForward, gram, lie));
}

// A step whose d does not fit a float is made unusable, others stay as they are.
void only_what_fits() {
  for (const bool overflows : {false, true}) {
    std::vector<double> gram(16, 0.0);
    for (int i = 0; i < 4; ++i) gram[i * 5] = 1.0 + i;
    if (overflows) gram[3 * 5] = 1e79;  // (3e38)² and more
    std::vector<double> before = gram;
    const double beta = 2.0;
    simt::launch(1, 32, Order::kForward, kernels::panel_ascent_check<float>, gram.data(), 2, false,
                 false, &beta, -1.0);
    CHECK(std::isinf(gram[15]) == overflows);
    gram[15] = before[15];
    CHECK(gram == before);
    gram = before;
    simt::launch(1, 32, Order::kForward, kernels::panel_ascent_check<double>, gram.data(), 2, false,
                 false, &beta, -1.0);
    CHECK(gram == before);
  }
}

}  // namespace

void simt_panel_ascent_tests() {
  storage_cases<float, float>();
  storage_cases<float, kernels::BFloat16>();
  storage_cases<float, kernels::Half>();
  storage_cases<double, double>();
  large_and_many();
  faults_are_seen();
  only_what_fits();
}

}  // namespace lyapcuda::test
