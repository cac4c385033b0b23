// gram and project in the emulator, against plain loops.
#include "../kernels/gram.cuh"
#include "../kernels/project.cuh"
#include "simt_panel_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

// --- gram ---------------------------------------------------------------------------------------
template <class T>
struct GramCase {
  bool symmetric;
  Panel<T> a, b;
  std::vector<Sum> expected;

  GramCase(int rows, int columns, int64_t n, int64_t shift, bool same)
      : symmetric(same), a(rows, n, shift, 64), b(columns, n, 0, 64) {
    randomise(a.array);
    randomise(b.array);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        expected.emplace_back();
        const Panel<T>& other = symmetric ? a : b;
        for (int64_t e = 0; e < n; ++e) expected.back().add(a.at(i, e), other.at(j, e));
      }
    }
  }

  template <bool kSymmetric, int kRows>
  std::vector<double> run_rows(unsigned grid, Order order, const double* gate, int64_t n) {
    const int pairs =
        symmetric ? kernels::symmetric_pairs(a.k) : kernels::rectangular_pairs(a.k, b.k);
    std::vector<double> partial(grid * kernels::gram_row(pairs), std::nan(""));
    std::vector<double> out(a.k * b.k, std::nan(""));
    simt::launch(grid, kernels::gram_threads(kRows), order, kernels::gram<T, kSymmetric, kRows>,
                 kernels::GramArguments<T>{a.data(), symmetric ? nullptr : b.data(), n, a.k, b.k,
                                           gate, partial.data()});
    simt::launch(kernels::gram_finish_blocks(pairs), kThreads, order, kernels::gram_finish,
                 partial.data(), int64_t{grid}, kernels::GramShape{a.k, b.k, symmetric}, out.data(),
                 gate);
    return out;
  }
  std::vector<double> run(unsigned grid, Order order, const double* gate = nullptr,
                          int64_t lie = 0) {
    std::vector<double> out;
    if (symmetric) {
      kernels::with_rows<8, 16, 32, 128>(
          a.k, [&](auto most) { out = run_rows<true, most()>(grid, order, gate, a.n + lie); });
    } else {
      kernels::with_rows<64, 256>(2 * std::max(a.k, b.k), [&](auto most) {
        out = run_rows<false, most()>(grid, order, gate, a.n + lie);
      });
    }
    return out;
  }
  bool right(const std::vector<double>& out) const {
    for (int i = 0; i < a.k; ++i) {
      for (int j = 0; j < b.k; ++j) {
        if (!expected[i * b.k + j].near(out[i * b.k + j])) return false;
        if (symmetric && out[i * b.k + j] != out[j * b.k + i]) return false;
      }
    }
    return a.array.whole() && b.array.whole();
  }
  void check(const std::vector<unsigned>& grids) {
    for (const unsigned grid : grids) {
      const std::vector<double> forward = run(grid, Order::kForward);
      CHECK(right(forward));
      CHECK(forward == run(grid, Order::kReverse));
    }
  }
};

template <class T>
void gram_cases() {
  for (const int64_t n : {1, 31, 33, 255, 257, 512, 1024}) {
    GramCase<T>(14, 14, n, n % 2, true).check({2});
    GramCase<T>(5, 3, n, n % 2, false).check({2});
  }
  GramCase<T>(14, 14, 4097, 0, true).check({1, 50});
  GramCase<T>(2, 2, 4096, 0, true).check({1, 3});
  for (const int k : {1, 2, 3, 5, 8, 9, 16, 17, 24, 25, 32}) {
    GramCase<T>(k, k, 257, 0, true).check({2});
    GramCase<T>(k, 33 - k, 256, 0, false).check({2});
  }
  for (const int k : {33, 64, 65, 128}) {
    GramCase<T>(k, k, 256, 0, true).check({1});
    GramCase<T>(k, k, 131, 1, true).check({3});
    GramCase<T>(k, 1, 131, 0, false).check({2});
    GramCase<T>(1, k, 128, 0, false).check({1});
    GramCase<T>(k, 160 - k, 67, 0, false).check({1});
  }
  GramCase<T>(128, 128, 67, 0, false).check({2});
  GramCase<T>(65, 128, 64, 0, false).check({1});
}

void gates() {
  GramCase<float> of(5, 5, 300, 0, true);
  of.a.at(2, 7) = std::nanf("");  // not read where the gate is closed
  const double open = 1.0, closed = 0.0;
  CHECK(of.run(2, Order::kForward, &closed) == std::vector<double>(25, 0.0));
  CHECK(std::isnan(of.run(2, Order::kForward, &open)[2 * 5 + 2]));
  of.a.at(2, 7) = 0.0f;
  CHECK(of.run(2, Order::kReverse, &open) == of.run(2, Order::kReverse));
}

// Barriers: before and after the products of every tile, then between warps that hand their sums
// over.
void faults_of_gram_are_seen() {
  GramCase<float> triangle(28, 28, 4 * 128, 0, true), large(70, 70, 4 * 64, 0, true);
  for (const int barrier : {0, 1}) {
    CHECK(sees_missing_barrier(
        barrier, [&](Order order) { return triangle.right(triangle.run(1, order)); }));
    CHECK(sees_missing_barrier(barrier,
                               [&](Order order) { return large.right(large.run(1, order)); }));
  }
  for (int barrier = 8; barrier < 8 + 4 * 7 - 1; ++barrier) {  // (nothing follows the last)
    CHECK(sees_missing_barrier(
        barrier, [&](Order order) { return triangle.right(triangle.run(1, order)); }));
  }
  GramCase<float> one(1, 1, 257, 0, true);
  CHECK(!one.right(one.run(1, Order::kForward, nullptr, -1)));
}

// --- project ------------------------------------------------------------------------------------
template <class T>
struct ProjectCase {
  Panel<T> v;
  Walled<T> w;
  std::vector<double> coefficients;

  ProjectCase(int m, int64_t n, int64_t shift) : v(m, n, shift, 64), w(n, shift, 0) {
    randomise(v.array);
    randomise(w);
    for (int i = 0; i < m; ++i) coefficients.push_back(random_number());
  }

  template <int kRows>
  bool right_with(unsigned grid, Order order, int64_t lie, std::vector<double>& sums) {
    const int m = v.k;
    Walled<T> now(v.n, 1, 64);
    std::memcpy(now.data(), w.data(), v.n * sizeof(T));
    std::vector<double> partial(grid * (m + 1), std::nan(""));
    sums.assign(m + 1, std::nan(""));
    simt::launch(grid, kThreads, order, kernels::project<T, kRows>,
                 kernels::ProjectArguments<T>{now.data(), m == 0 ? nullptr : v.data(), v.n + lie, m,
                                              coefficients.data(), partial.data()});
    simt::launch(kernels::project_finish_blocks(m), kThreads, order, kernels::project_finish,
                 partial.data(), int64_t{grid}, m, sums.data());
    std::vector<Sum> expected(m + 1);
    bool right = now.whole() && v.array.whole();
    for (int64_t e = 0; e < v.n; ++e) {
      T x = w[e];
      for (int i = 0; i < m; ++i) x = x - static_cast<T>(coefficients[i]) * v.at(i, e);
      right = right && now[e] == x;
      for (int i = 0; i < m; ++i) expected[i].add(v.at(i, e), x);
      expected[m].add(x, x);
    }
    for (int i = 0; i <= m; ++i) right = right && expected[i].near(sums[i]);
    return right;
  }
  bool right(unsigned grid, Order order, int64_t lie, std::vector<double>& sums) {
    bool right = false;
    kernels::with_rows<16, 32, 129>(
        v.k + 1, [&](auto most) { right = right_with<most()>(grid, order, lie, sums); });
    return right;
  }
  void check(const std::vector<unsigned>& grids) {
    for (const unsigned grid : grids) {
      std::vector<double> forward, reverse;
      CHECK(right(grid, Order::kForward, 0, forward));
      CHECK(right(grid, Order::kReverse, 0, reverse));
      CHECK(forward == reverse);
    }
  }
};

template <class T>
void project_cases() {
  for (const int64_t n : {1, 31, 33, 255, 256, 257}) {
    for (const int m : {0, 1, 14, 31, 32, 33, 128}) ProjectCase<T>(m, n, n % 2).check({2});
  }
  ProjectCase<T>(5, 4097, 1).check({1, 3, 7});
  ProjectCase<T>(5, 4096, 0).check({3});
  ProjectCase<T>(40, 4096, 0).check({3});
}

void faults_of_project_are_seen() {
  ProjectCase<float> of(5, 600, 0), single(1, 600, 0);
  std::vector<double> sums;
  for (const int barrier : {0, 1, 2}) {
    CHECK(sees_missing_barrier(barrier, [&](Order order) { return of.right(1, order, 0, sums); }));
  }
  for (const int64_t lie : {-1, 1}) CHECK(!single.right(1, Order::kForward, lie, sums));
}

}  // namespace

void simt_gram_tests() {
  gram_cases<float>();
  gram_cases<double>();
  gates();
  faults_of_gram_are_seen();
  project_cases<float>();
  project_cases<double>();
  faults_of_project_are_seen();
}

}  // namespace lyapcuda::test
