// What the bodies over panels work on; free of torch, so that the C++ tests can call them. A panel
// is given by a pointer into its first row and `row`, the elements from one row to the next.
#pragma once

#include <cstdint>
#include <vector>

namespace lyapcuda::cpu {

// Elements of a panel's rows that are multiplied with each other at a time, as doubles: those of
// seven rows stay in the first cache, those of all rows in the second.
constexpr int64_t kGramTile = 256;

template <class T>
struct GramArguments {
  const T *a, *b;
  int64_t rows_a, rows_b, row;
  bool same;         // b is a: the result is symmetric
  const T* weights;  // of the elements; may be null
};

template <class T, class P>
struct PanelAscentArguments {
  T* d;
  const T* q;
  const P *g0, *g1, *theta;  // g1 is a panel, the others are shared by all rows
  const T* p;
  T* p_next;
  const T* metric;  // shared by all rows
  int64_t rows, row;
};

struct PanelAscentScalars {
  double rate, weight_decay, momentum;
  const double* displacement;  // of every row
};

template <class T>
struct CombineArguments {
  T* out;
  const T* panel;
  const T* coefficients;  // (rows_in, rows_out)
  int64_t rows_in, rows_out, row;
};

// Elements of a row that combine works on at a time, so that those of all rows stay in the cache.
constexpr int64_t combine_tile(int64_t rows) {
  return rows <= 8 ? 1024 : rows <= 16 ? 512 : rows <= 32 ? 256 : rows <= 64 ? 128 : 64;
}

template <class T, class P>
struct PanelRecenterArguments {
  CombineArguments<T> combine;  // out is q, panel is d
  P* copies;
  const P* theta;
  const T* metric;
  const double* displacement;  // of every row, with a metric
  bool pending;
};

constexpr int64_t kProjectTile = 512;

// One block of a step along the parameters, and along the rows of a panel beside them.
template <class T, class P>
struct DirectionArguments {
  P* theta;
  const P* gradient;
  T* buffer;  // of the momentum, where there is one
};

struct DirectionScalars {
  double weight_decay, momentum;
};

template <class T>
struct PanelRows {
  const T* panel;
  int64_t rows, row;
};

// Scratch memory that starts where cache lines do.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t size) : memory_(size + 64 / sizeof(T)) {
    const auto past = reinterpret_cast<uintptr_t>(memory_.data()) % 64;
    data_ = memory_.data() + (past == 0 ? 0 : (64 - past) / sizeof(T));
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data() { return data_; }

 private:
  std::vector<T> memory_;
  T* data_;
};

}  // namespace lyapcuda::cpu
