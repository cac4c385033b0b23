// displace and difference in the emulator, against plain loops.
#include "../kernels/difference.cuh"
#include "../kernels/displace.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

// --- displace -----------------------------------------------------------------------------------
// Sizes handed to the kernel may be wrong by `lie`.
template <class T, class P>
bool displaces_right(const Layout& layout, unsigned grid, Order order, int64_t lie,
                     double (&sums)[2]) {
  const double step = 0.37;
  Walled<T> v(layout.total, layout.shift, 64);
  randomise(v);
  Tensors<P> theta(layout, true), copies(layout, false);
  std::vector<int64_t> sizes = layout.sizes;
  sizes.back() += lie;
  std::vector<double> rows;
  P* const* const lists[2] = {copies.list(), theta.list()};
  kernels::for_each_table(
      lists, sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
        const size_t filled = rows.size();
        rows.resize(filled + grid * kernels::kDisplaceSums, std::nan(""));
        simt::launch(grid, kThreads, order, kernels::displace<T, P>, table,
                     kernels::DisplaceArguments<T>{v.data(), &step, rows.data() + filled});
      });
  simt::launch(1, kThreads, order, kernels::displace_finish, rows.data(),
               static_cast<int64_t>(rows.size() / kernels::kDisplaceSums), &sums[0]);
  Sum along, square;
  bool right = true;
  for (int64_t s = 0; s < layout.count(); ++s) {
    for (int64_t i = 0; i < layout.sizes[s]; ++i) {
      const T x = v[layout.offsets[s] + i], here = value_of<T>(theta[s][i]);
      const P out = stored_as<P>(here + static_cast<T>(step) * x);
      right = right && std::memcmp(&copies[s][i], &out, sizeof(P)) == 0;
      along.add(x, value_of<T>(out) - here);
      square.add(x, x);
    }
  }
  return right && along.near(sums[0]) && square.near(sums[1]) && copies.whole() && theta.whole() &&
         v.whole();
}

// --- difference ---------------------------------------------------------------------------------
template <class T, class P>
bool differs_right(const Layout& layout, unsigned grid, Order order, int64_t lie, double keep,
                   double decay) {
  const double scale = -1.7;
  Walled<T> v(layout.total, layout.shift, 64), before(layout.total, 0, 0);
  Walled<T> out(layout.total, 2 * layout.shift, 64);
  randomise(v);
  randomise(before);
  Tensors<P> plus(layout, true), minus(layout, true);
  for (int64_t s = 0; keep != 0.0 && s < layout.count(); ++s) {
    for (int64_t i = 0; i < layout.sizes[s]; ++i) {
      out[layout.offsets[s] + i] = before[layout.offsets[s] + i];
    }
  }
  std::vector<int64_t> sizes = layout.sizes;
  sizes.back() += lie;
  const P* const* const lists[2] = {plus.const_list(), minus.const_list()};
  kernels::for_each_table(
      lists, sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
        simt::launch(grid, kThreads, order, kernels::difference<T, P>, table,
                     kernels::DifferenceArguments<T>{out.data(), decay != 0.0 ? v.data() : nullptr,
                                                     &scale, keep, decay});
      });
  bool right = true;
  for (int64_t s = 0; s < layout.count(); ++s) {
    for (int64_t i = 0; i < layout.sizes[s]; ++i) {
      const int64_t at = layout.offsets[s] + i;
      T expected = static_cast<T>(scale) * (value_of<T>(plus[s][i]) - value_of<T>(minus[s][i]));
      if (decay != 0.0) expected = expected + static_cast<T>(decay) * v[at];
      if (keep != 0.0) expected = expected + static_cast<T>(keep) * before[at];
      right = right && out[at] == expected;
    }
  }
  return right && layout.gaps_untouched(out) && out.whole() && plus.whole() && minus.whole();
}

template <class T, class P>
void cases() {
  for (const auto& sizes : size_lists()) {
    const bool several = sizes.size() > 1 || sizes[0] > 1000;
    for (const int64_t shift : {0, 1}) {
      const Layout layout(sizes, shift);
      for (const unsigned grid : several ? std::vector<unsigned>{1, 3, 7} : std::vector{3u}) {
        for (const Order order : kOrders) {
          double sums[2];
          CHECK(displaces_right<T, P>(layout, grid, order, 0, sums));
          CHECK(differs_right<T, P>(layout, grid, order, 0, 0.0, 0.0));
          CHECK(differs_right<T, P>(layout, grid, order, 0, -0.6, 0.05));
        }
      }
    }
  }
  const Layout layout({4097, 33}, 1);
  CHECK(differs_right<T, P>(layout, 3, Order::kForward, 0, 0.3, 0.0));
  CHECK(differs_right<T, P>(layout, 3, Order::kForward, 0, 0.0, 0.7));
  // A tail cut short or taken too far is seen.
  for (const int64_t lie : {-1, 1}) {
    double sums[2];
    CHECK(!displaces_right<T, P>(layout, 3, Order::kForward, lie, sums));
    CHECK(!differs_right<T, P>(layout, 3, Order::kForward, lie, 0.0, 0.0));
  }
}

// out's segments as plus or as minus.
void difference_over_an_input() {
  const Layout layout({33, 4097}, 0);
  for (const bool over_plus : {true, false}) {
    Walled<float> out(layout.total, 0, 0), before(layout.total, 0, 0);
    randomise(before);
    std::memcpy(out.data(), before.data(), layout.total * sizeof(float));
    Tensors<float> other(layout, true);
    std::vector<const float*> views;
    for (const int64_t offset : layout.offsets) views.push_back(out.data() + offset);
    const float* const* const lists[2] = {over_plus ? views.data() : other.const_list(),
                                          over_plus ? other.const_list() : views.data()};
    const double scale = 2.5;
    kernels::for_each_table(
        lists, layout.sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
          simt::launch(3, kThreads, Order::kReverse, kernels::difference<float, float>, table,
                       kernels::DifferenceArguments<float>{out.data(), nullptr, &scale, 0.0, 0.0});
        });
    bool right = true;
    for (int64_t s = 0; s < layout.count(); ++s) {
      for (int64_t i = 0; i < layout.sizes[s]; ++i) {
        const int64_t at = layout.offsets[s] + i;
        const float mine = before[at], its = other[s][i];
        right = right && out[at] == 2.5f * (over_plus ? mine - its : its - mine);
      }
    }
    CHECK(right);
  }
}

void a_missing_barrier_is_seen() {
  const Layout layout({4097}, 0);
  CHECK(sees_missing_barrier(0, [&](Order order) {
    double sums[2];
    return displaces_right<float, float>(layout, 3, order, 0, sums);
  }));
}

}  // namespace

void simt_probe_tests() {
  cases<float, float>();
  cases<float, kernels::BFloat16>();
  cases<float, kernels::Half>();
  cases<double, double>();
  difference_over_an_input();
  a_missing_barrier_is_seen();
}

}  // namespace lyapcuda::test
