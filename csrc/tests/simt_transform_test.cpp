// combine and panel_recenter in the emulator, against plain loops.
#include "../kernels/combine.cuh"
#include "../kernels/panel_recenter.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

// Σ_i panel_i·T(matrix[i][j]), as the ops define it.
template <class T>
T combined(const Panel<T>& panel, const std::vector<double>& matrix, int columns, int j,
           int64_t e) {
  T sum = panel.at(0, e) * static_cast<T>(matrix[j]);
  for (int i = 1; i < panel.k; ++i) {
    sum = sum + panel.at(i, e) * static_cast<T>(matrix[i * columns + j]);
  }
  return sum;
}

std::vector<double> some_matrix(int rows, int columns) {
  std::vector<double> matrix(rows * columns);
  for (double& entry : matrix) entry = random_number();
  return matrix;
}

// --- combine ------------------------------------------------------------------------------------
template <class T>
struct CombineCase {
  int columns;
  Panel<T> panel;
  std::vector<double> matrix;

  CombineCase(int rows, int of, int64_t n, int64_t shift)
      : columns(of), panel(rows, n, shift, 64), matrix(some_matrix(rows, of)) {
    randomise(panel.array);
  }

  void launch(unsigned grid, Order order, T* out, const T* from, int64_t n, const double* gate) {
    const kernels::CombineArguments<T> arguments{out,     from,          n,   panel.k,
                                                 columns, matrix.data(), gate};
    kernels::with_rows<8, 16, 32, 128>(std::max(panel.k, columns), [&](auto most) {
      simt::launch(grid, kThreads, order, kernels::combine<T, most()>, arguments);
    });
  }
  bool right(unsigned grid, Order order, int64_t out_shift = 0, int64_t lie = 0) {
    Panel<T> out(columns, panel.n, out_shift, 64);
    launch(grid, order, out.data(), panel.data(), panel.n + lie, nullptr);
    bool right = out.array.whole() && panel.array.whole();
    for (int j = 0; j < columns; ++j) {
      for (int64_t e = 0; e < panel.n; ++e) {
        right = right && out.at(j, e) == combined(panel, matrix, columns, j, e);
      }
    }
    return right;
  }
  // out starts at the panel's own memory; rows that it has not stay.
  bool right_in_place(unsigned grid, Order order, const double* gate = nullptr) {
    Panel<T> both(panel.k, panel.n, 0, 64);
    both.take(panel);
    launch(grid, order, both.data(), both.data(), panel.n, gate);
    bool right = both.array.whole();
    const bool open = gate == nullptr || *gate != 0.0;
    for (int j = 0; j < panel.k; ++j) {
      for (int64_t e = 0; e < panel.n; ++e) {
        const bool stays = !open || j >= columns;
        right = right &&
                both.at(j, e) == (stays ? panel.at(j, e) : combined(panel, matrix, columns, j, e));
      }
    }
    return right;
  }
};

template <class T>
void combine_cases() {
  for (const int64_t n : {1, 31, 33, 128, 255, 257}) {
    for (const int k : {1, 2, 3, 5, 14, 32}) {
      for (const Order order : kOrders) {
        CHECK(CombineCase<T>(k, k, n, n % 2).right(2, order));
        CHECK(CombineCase<T>(k, (k + 1) / 2, n, 0).right_in_place(2, order));
      }
    }
  }
  for (const unsigned grid : {1u, 3u, 7u}) {
    CHECK(CombineCase<T>(14, 14, 4097, 0).right(grid, Order::kForward));
    CHECK(CombineCase<T>(14, 14, 4096, 0).right_in_place(grid, Order::kReverse));
    CHECK(CombineCase<T>(5, 3, 4096, 0).right(grid, Order::kReverse, 1));
  }
  for (const Order order : kOrders) {
    CHECK(CombineCase<T>(33, 33, 257, 0).right(3, order));
    CHECK(CombineCase<T>(128, 128, 192, 0).right_in_place(2, order));
    CHECK(CombineCase<T>(128, 40, 131, 0).right_in_place(2, order));
    CHECK(CombineCase<T>(1, 128, 131, 1).right(1, order));
    CHECK(CombineCase<T>(128, 1, 128, 0).right(1, order));
  }
  const double open = 2.0, closed = 0.0;
  CHECK(CombineCase<T>(5, 5, 300, 0).right_in_place(2, Order::kForward, &open));
  CHECK(CombineCase<T>(5, 5, 300, 0).right_in_place(2, Order::kForward, &closed));
}

void faults_of_combine_are_seen() {
  CombineCase<float> small(5, 5, 1200, 0), large(128, 128, 200, 0), single(1, 1, 257, 0);
  for (const int barrier : {0, 1, 2}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return small.right(1, order); }));
  }
  // In turn before and after some columns of the matrix are staged.
  for (const int barrier : {1, 2, 3, 4}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return large.right(1, order); }));
  }
  for (const int64_t lie : {-1, 1}) CHECK(!single.right(1, Order::kForward, 0, lie));
}

// --- panel_recenter -----------------------------------------------------------------------------
template <class T, class P>
struct RecenterCase {
  Layout layout;
  int k;
  Panel<T> q, d;
  Tensors<P> theta;
  std::vector<double> matrix;

  RecenterCase(const Layout& of, int separations)
      : layout(of),
        k(separations),
        q(k, of.total, 0, 0),
        d(k, of.total, of.shift, 64),
        theta(of, true),
        matrix(some_matrix(k, k)) {
    randomise(q.array);
    randomise(d.array);
  }

  void launch(unsigned grid, Order order, T* to, P* copies, const T* from, double pending,
              int64_t lie) {
    std::vector<int64_t> sizes = layout.sizes;
    sizes.back() += lie;
    const P* const* const lists[1] = {theta.const_list()};
    kernels::with_rows<8, 16, 32>(k, [&](auto most) {
      kernels::for_each_table(
          lists, sizes.data(), layout.offsets.data(), layout.count(),
          [&](const auto& table) {
            simt::launch(grid, kThreads, order, kernels::panel_recenter<T, P, most()>, table,
                         kernels::PanelRecenterArguments<T, P>{to, copies, from, layout.total, k,
                                                               matrix.data(), &pending});
          },
          kernels::kTransformLength<T, most()>);
    });
  }
  bool elements_right(const Panel<T>& now, const Panel<P>& copies, bool pending) const {
    bool right = true;
    for (int j = 0; j < k; ++j) {
      int64_t end = 0;
      for (int64_t s = 0; s < layout.count(); ++s) {
        for (; end < layout.offsets[s]; ++end) right = right && now.at(j, end) == q.at(j, end);
        for (int64_t i = 0; i < layout.sizes[s]; ++i, ++end) {
          const T next = pending ? combined(d, matrix, k, j, end) : q.at(j, end);
          const P copy = stored_as<P>(value_of<T>(theta[s][i]) + next);
          right = right && now.at(j, end) == next &&
                  std::memcmp(&copies.at(j, end), &copy, sizeof(P)) == 0;
        }
      }
    }
    return right;
  }
  bool right(unsigned grid, Order order, bool pending, int64_t lie = 0) {
    Panel<T> now(k, layout.total, 0, 64);
    Panel<P> copies(k, layout.total, layout.shift, 64);
    now.take(q);
    launch(grid, order, now.data(), copies.data(), d.data(), pending ? 1.0 : 0.0, lie);
    return elements_right(now, copies, pending) && copies.gaps_untouched(layout) &&
           now.array.whole() && theta.whole() && d.array.whole();
  }
  // copies in d's memory: an element's d's are all read before its copies are written.
  bool right_over_d(unsigned grid, Order order, bool pending) {
    static_assert(sizeof(T) == sizeof(P));
    Panel<T> now(k, layout.total, 0, 64), both(k, layout.total, layout.shift, 64);
    now.take(q);
    both.take(d);
    launch(grid, order, now.data(), both.data(), both.data(), pending ? 1.0 : 0.0, 0);
    return elements_right(now, both, pending) && both.array.whole();
  }
};

template <class T, class P>
void recenter_cases() {
  for (const int64_t shift : {0, 1}) {
    for (const Order order : kOrders) {
      for (const bool pending : {true, false}) {
        for (const int k : {1, 2, 3, 5, 14, 32}) {
          CHECK(RecenterCase<T, P>(Layout({128, 33, 131}, shift), k).right(2, order, pending));
        }
        CHECK(RecenterCase<T, P>(Layout({0, 1, 31, 33, 255, 257, 40, 41, 40, 41}, shift), 3)
                  .right(3, order, pending));
        CHECK(RecenterCase<T, P>(Layout({4097, 1}, shift), 5).right(3, order, pending));
        if constexpr (sizeof(T) == sizeof(P)) {
          CHECK(RecenterCase<T, P>(Layout({257, 300}, shift), 5).right_over_d(2, order, pending));
        }
      }
    }
  }
  for (const unsigned grid : {1u, 7u}) {
    CHECK(RecenterCase<T, P>(Layout({4097}, 0), 3).right(grid, Order::kReverse, true));
  }
}

void faults_of_recenter_are_seen() {
  RecenterCase<float, float> of(Layout({40, 400}, 0), 14);
  for (const int barrier : {0, 1, 2}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return of.right(1, order, true); }));
  }
  // (Where nothing is pending a thread takes from a full tile what it put there.)
  CHECK(sees_missing_barrier(0, [&](Order order) { return of.right(1, order, false); }));
  for (const int64_t lie : {-1, 1}) CHECK(!of.right(1, Order::kForward, true, lie));
}

}  // namespace

void simt_transform_tests() {
  combine_cases<float>();
  combine_cases<double>();
  faults_of_combine_are_seen();
  recenter_cases<float, float>();
  recenter_cases<float, kernels::BFloat16>();
  recenter_cases<float, kernels::Half>();
  recenter_cases<double, double>();
  faults_of_recenter_are_seen();
}

}  // namespace lyapcuda::test
