// ascent and ascent_finish (kernels/ascent.cuh) in the emulator, against a plain loop.
#include "../kernels/ascent.cuh"

#include "simt_support.h"

namespace lyapcuda::test {
namespace {

using kernels::AscentArguments;
using kernels::kThreads;
using simt::Order;

struct Sums {
  double value[kSumSize] = {}, magnitude[kSumSize] = {};

  void add(SumField field, double a, double b) {
    value[field] += a * b;
    magnitude[field] += std::fabs(a * b);
  }
  bool near(const double* others) const {
    for (int k = 0; k < kSumSize; ++k) {
      if (!(std::fabs(value[k] - others[k]) <= 1e-12 * magnitude[k])) return false;
    }
    return true;
  }
};

template <class T, class P, bool kRealised, bool kMomentum>
struct AscentCase {
  static constexpr double kSign = -1.0, kDecay = 0.05, kMomentumValue = 0.9;
  static constexpr double kEps = sizeof(T) == sizeof(float) ? 0x1p-24 : 0x1p-53;

  const Layout layout;
  std::vector<double> state = some_state();
  Walled<T> q, p;
  Tensors<P> g0, g1, theta;

  explicit AscentCase(const Layout& of)
      : layout(of),
        q(of.total, 0, 0),
        p(of.total, of.shift, 64),  // aligned unlike q, as the outputs below
        g0(of, true),
        g1(of, true),
        theta(of, true) {
    randomise(q);
    randomise(p);
  }

  // What the kernels make of it; d may be q.
  void run(unsigned grid, Order order, T* d, const T* q_data, T* p_next, double* sums) {
    std::vector<double> rows;
    const P* const* const lists[3] = {g0.const_list(), g1.const_list(), theta.const_list()};
    kernels::for_each_table(
        lists, layout.sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
          const size_t filled = rows.size();
          rows.resize(filled + grid * kSumSize, std::nan(""));
          const AscentArguments<T> arguments{d,      q_data,         p.data(),
                                             p_next, state.data(),   kSign,
                                             kDecay, kMomentumValue, rows.data() + filled};
          simt::launch(grid, kThreads, order, kernels::ascent<T, P, kRealised, kMomentum>, table,
                       arguments);
        });
    simt::launch(1, kThreads, order, kernels::ascent_finish<T>, rows.data(),
                 static_cast<int64_t>(rows.size() / kSumSize), sums);
  }

  // Elements to the bit of plain T arithmetic, and that within its roundings of fp64.
  bool elements_right(const Walled<T>& d, const Walled<T>& p_next, Sums& sums) const {
    const T scale = static_cast<T>(state[k_scale]), rate = static_cast<T>(kSign * state[k_beta]);
    const T decay = static_cast<T>(kDecay), momentum = static_cast<T>(kMomentumValue);
    bool right = true;
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        const T carried = q[at] * scale, here = value_of<T>(theta[s][i]);
        T moved = carried;
        if (kRealised) moved = value_of<T>(stored_as<P>(here + carried)) - here;
        const T y = (value_of<T>(g1[s][i]) - value_of<T>(g0[s][i])) + moved * decay;
        const T w = kMomentum ? p[at] * scale * momentum + y : y;
        const T out = carried + w * rate;
        right = right && d[at] == out && (!kMomentum || p_next[at] == w);

        const double wide_carried = state[k_scale] * double(q[at]);
        const double wide_moved = kRealised ? double(moved) : wide_carried;
        const double wide_g = value_of<double>(g1[s][i]) - value_of<double>(g0[s][i]);
        double wide_w = wide_g + kDecay * wide_moved;
        if (kMomentum) wide_w += kMomentumValue * state[k_scale] * double(p[at]);
        const double wide_out = wide_carried + kSign * state[k_beta] * wide_w;
        right = right && std::fabs(wide_out - double(out)) <= 16.0 * kEps;

        sums.add(kSumDD, out, out);
        sums.add(kSumQQ, moved, moved);
        sums.add(kSumQY, moved, y);
        sums.add(kSumYY, y, y);
        sums.add(kSumCarriedQ, carried, moved);
        sums.add(kSumCarriedY, carried, y);
      }
    }
    return right;
  }

  void check(const std::vector<unsigned>& grids) {
    Walled<T> first(layout.total, 0, 0);
    Sums expected;
    bool have_first = false;
    for (const unsigned grid : grids) {
      double of_order[2][kSumSize];
      for (const Order order : kOrders) {
        Walled<T> d(layout.total, 2 * layout.shift, 0), p_next(layout.total, 3 * layout.shift, 64);
        double* const sums = of_order[order == Order::kReverse];
        run(grid, order, d.data(), q.data(), p_next.data(), sums);
        if (!have_first) {
          CHECK(elements_right(d, p_next, expected));
          std::memcpy(first.data(), d.data(), layout.total * sizeof(T));
          have_first = true;
        }
        CHECK(same_bits(d, first));
        CHECK(expected.near(sums));
        CHECK(layout.gaps_untouched(d) && d.whole() && p_next.whole());
        CHECK(kMomentum ? layout.gaps_untouched(p_next) : p_next.untouched(0, layout.total));
      }
      CHECK(std::memcmp(of_order[0], of_order[1], sizeof(of_order[0])) == 0);
    }
    CHECK(q.whole() && p.whole() && g0.whole() && g1.whole() && theta.whole());
  }

  // d = q: every element is read before it is written.
  void check_in_place() {
    Walled<T> d(layout.total, 0, 0), p_next(layout.total, 0, 0);
    double sums[kSumSize], sums_in_place[kSumSize];
    run(3, Order::kForward, d.data(), q.data(), p_next.data(), sums);
    Walled<T> both(layout.total, 0, 0);
    std::memcpy(both.data(), q.data(), layout.total * sizeof(T));
    run(3, Order::kReverse, both.data(), both.data(), p_next.data(), sums_in_place);
    bool same = true;
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        same = same && both[layout.offsets[s] + i] == d[layout.offsets[s] + i];
      }
    }
    CHECK(same && std::memcmp(sums, sums_in_place, sizeof(sums)) == 0);
  }
};

template <class T, class P, bool kRealised, bool kMomentum>
void cases() {
  using Case = AscentCase<T, P, kRealised, kMomentum>;
  for (const auto& sizes : size_lists()) {
    // A launch is dear: all grids where the blocks differ in what they get, one elsewhere.
    const bool several = sizes.size() > 1 || sizes[0] > 1000;
    for (const int64_t shift : {0, 1}) {
      Case(Layout(sizes, shift)).check(several ? std::vector<unsigned>{1, 7} : std::vector{3u});
    }
  }
  Case(Layout({257, 31}, 0)).check_in_place();
}

template <class T, class P>
void storage_cases() {
  cases<T, P, false, false>();
  cases<T, P, false, true>();
  cases<T, P, true, false>();
  cases<T, P, true, true>();
}

void more_tensors_than_a_table_takes() {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 150; ++i) sizes.push_back(i % 11);
  AscentCase<float, float, false, false>(Layout(sizes, 0)).check({3});
}

void only_finite_separations_count() {
  AscentCase<float, float, false, false> of(Layout({257}, 0));
  Walled<float> d(of.layout.total, 0, 0);
  double sums[kSumSize];
  of.q[100] = 3e38f;
  of.state[k_scale] = 1e3;
  of.run(3, Order::kForward, d.data(), of.q.data(), nullptr, sums);
  CHECK(std::isinf(sums[kSumDD]));
  of.q[100] = std::nanf("");
  of.run(3, Order::kForward, d.data(), of.q.data(), nullptr, sums);
  CHECK(!std::isfinite(sums[kSumDD]) && std::isnan(sums[kSumQQ]));
}

}  // namespace

void simt_ascent_tests() {
  storage_cases<float, float>();
  storage_cases<float, kernels::BFloat16>();
  storage_cases<float, kernels::Half>();
  storage_cases<double, double>();
  more_tensors_than_a_table_takes();
  only_finite_separations_count();
}

}  // namespace lyapcuda::test
