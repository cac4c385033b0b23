// Dense algebra of small matrices (up to 32×32) for one team of threads: a CUDA block, or the one
// thread of a CPU op. Every number is computed by one thread, in an order that does not depend on
// how many there are, and products are never contracted with sums: every team gets the same bits.
//
// A Team has `rank`, `size` and sync(), which all of its threads have to reach; what a function
// wrote may be read by any thread when it returns.
#pragma once

#include <cmath>
#include <cstdint>

#include "growth.h"

namespace lyapcuda {

struct SoloTeam {
  int rank = 0, size = 1;
  void sync() const {}
};

// A row-major matrix in scratch memory. The odd row length keeps columns apart in shared memory's
// banks.
struct Matrix {
  double* data;
  int stride;
  LYAPCUDA_HOST_DEVICE double& operator()(int i, int j) const { return data[i * stride + j]; }
};

// Rows and columns are padded to an even number: the rotations below go by pairs.
LYAPCUDA_HOST_DEVICE constexpr int even(int k) { return k + k % 2; }
LYAPCUDA_HOST_DEVICE constexpr int matrix_stride(int k) { return even(k) + 1; }
LYAPCUDA_HOST_DEVICE constexpr int matrix_size(int k) { return even(k) * matrix_stride(k); }

// Sets `flag` for all threads where any of them found something: test(i) for i < count. The flag
// must not be in use by an earlier call that some thread may still read.
template <class Team, class Test>
LYAPCUDA_HOST_DEVICE inline bool any_of(const Team& team, double* flag, int count,
                                        const Test& test) {
  if (team.rank == 0) *flag = 0.0;
  team.sync();
  for (int i = team.rank; i < count; i += team.size) {
    if (test(i)) *flag = 1.0;
  }
  team.sync();
  return *flag != 0.0;
}

// The lower factor of source(i, j) = l·lᵀ. Returns k; or, for all threads alike, the first pivot
// that is not above least·source(j, j): l is then unfinished. source and l must not share memory.
template <class Team, class Source>
LYAPCUDA_HOST_DEVICE inline int cholesky(const Team& team, int k, const Source& source, Matrix l,
                                         double least) {
  for (int e = team.rank; e < k * k; e += team.size) l(e / k, e % k) = source(e / k, e % k);
  team.sync();
  for (int p = 0; p < k; ++p) {
    const double pivot = l(p, p);
    if (!(pivot > mul(least, source(p, p))) || !std::isfinite(pivot)) return p;
    const double root = std::sqrt(pivot);
    for (int i = p + 1 + team.rank; i < k; i += team.size) l(i, p) /= root;
    team.sync();
    if (team.rank == 0) l(p, p) = root;
    const int left = k - p - 1;
    for (int e = team.rank; e < left * left; e += team.size) {
      const int i = p + 1 + e / left, j = p + 1 + e % left;
      if (j <= i) l(i, j) -= mul(l(i, p), l(j, p));
    }
    team.sync();
  }
  return k;
}

// a ← l⁻¹·a.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void solve_left(const Team& team, int k, Matrix l, Matrix a) {
  for (int p = 0; p < k; ++p) {
    for (int j = team.rank; j < k; j += team.size) a(p, j) /= l(p, p);
    team.sync();
    for (int e = team.rank; e < (k - p - 1) * k; e += team.size) {
      const int i = p + 1 + e / k, j = e % k;
      a(i, j) -= mul(l(i, p), a(p, j));
    }
    team.sync();
  }
}

// a ← l⁻ᵀ·a.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void solve_left_transposed(const Team& team, int k, Matrix l,
                                                       Matrix a) {
  for (int p = k - 1; p >= 0; --p) {
    for (int j = team.rank; j < k; j += team.size) a(p, j) /= l(p, p);
    team.sync();
    for (int e = team.rank; e < p * k; e += team.size) {
      const int i = e / k, j = e % k;
      a(i, j) -= mul(l(p, i), a(p, j));
    }
    team.sync();
  }
}

// a ← a·l⁻ᵀ.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void solve_right(const Team& team, int k, Matrix l, Matrix a) {
  for (int p = 0; p < k; ++p) {
    for (int i = team.rank; i < k; i += team.size) a(i, p) /= l(p, p);
    team.sync();
    const int left = k - p - 1;
    for (int e = team.rank; e < k * left; e += team.size) {
      const int i = e / left, j = p + 1 + e % left;
      a(i, j) -= mul(a(i, p), l(j, p));
    }
    team.sync();
  }
}

// a = l⁻¹·source·l⁻ᵀ for a symmetric source, symmetric to the last bit; padding becomes zero.
template <class Team, class Source>
LYAPCUDA_HOST_DEVICE inline void whiten(const Team& team, int k, const Source& source, Matrix l,
                                        Matrix a) {
  for (int e = team.rank; e < k * k; e += team.size) a(e / k, e % k) = source(e / k, e % k);
  team.sync();
  solve_left(team, k, l, a);
  solve_right(team, k, l, a);
  const int padded = even(k);
  for (int e = team.rank; e < padded * padded; e += team.size) {
    const int i = e / padded, j = e % padded;
    if (i >= k || j >= k) {
      a(i, j) = 0.0;
    } else if (i < j) {
      a(i, j) = a(j, i);
    }
  }
  team.sync();
}

// Where eigen keeps the rotations of a round.
struct Rotations {
  double *cosine, *sine, *tangent;  // of even(k)/2 each
  double* largest;                  // of k
  double* flags;                    // of 2
};

// Pair `slot` of round `round` of a tournament of `players` (even): in players − 1 rounds everybody
// meets everybody once.
LYAPCUDA_HOST_DEVICE inline void tournament_pair(int players, int round, int slot, int& p, int& q) {
  const int others = players - 1;
  const int a = slot == 0 ? others : (round + slot) % others;
  const int b = (round + others - slot) % others;
  p = a < b ? a : b;
  q = a < b ? b : a;
}

// Off-diagonal entries below this part of the largest entry count as zero: far below rounding, and
// reached in one sweep more, since convergence is quadratic.
constexpr double kJacobiNegligible = 0x1p-60;
constexpr int kJacobiSweeps = 30;  // a dozen is the most that matrices of this size ever took

// The Jacobi rotation that makes a(p, q) zero.
LYAPCUDA_HOST_DEVICE inline bool find_rotation(Matrix a, int p, int q, double negligible, double& c,
                                               double& s, double& t) {
  c = 1.0;
  s = t = 0.0;
  const double apart = a(p, q);
  if (std::fabs(apart) <= negligible) return false;
  const double cot2 = (a(q, q) - a(p, p)) / mul(2.0, apart);
  const double size = std::fabs(cot2) + std::sqrt(mul(cot2, cot2) + 1.0);
  t = cot2 < 0.0 ? -1.0 / size : 1.0 / size;
  c = 1.0 / std::sqrt(mul(t, t) + 1.0);
  s = mul(t, c);
  return true;
}

// Applies the rotations of two pairs, m from the left and n from the right, to the four entries
// where they cross, and mirrors them.
LYAPCUDA_HOST_DEVICE inline void rotate_block(Matrix a, const Rotations& by, int players, int round,
                                              int m, int n) {
  int p, q, r, s;
  tournament_pair(players, round, m, p, q);
  tournament_pair(players, round, n, r, s);
  if (m == n) {
    const double change = mul(by.tangent[m], a(p, q));
    if (by.tangent[m] == 0.0) return;
    a(p, p) -= change;
    a(q, q) += change;
    a(p, q) = a(q, p) = 0.0;
    return;
  }
  const double cm = by.cosine[m], sm = by.sine[m], cn = by.cosine[n], sn = by.sine[n];
  const double pr = mul(cm, a(p, r)) - mul(sm, a(q, r)), ps = mul(cm, a(p, s)) - mul(sm, a(q, s));
  const double qr = mul(sm, a(p, r)) + mul(cm, a(q, r)), qs = mul(sm, a(p, s)) + mul(cm, a(q, s));
  a(p, r) = a(r, p) = mul(cn, pr) - mul(sn, ps);
  a(p, s) = a(s, p) = mul(sn, pr) + mul(cn, ps);
  a(q, r) = a(r, q) = mul(cn, qr) - mul(sn, qs);
  a(q, s) = a(s, q) = mul(sn, qr) + mul(cn, qs);
}

// a = z·diag·zᵀ by cyclic Jacobi, the pairs of a round at once: a becomes diagonal. a is symmetric
// and finite, with zeros as padding.
template <class Team>
LYAPCUDA_HOST_DEVICE inline void eigen(const Team& team, int k, Matrix a, Matrix z,
                                       const Rotations& by) {
  const int players = even(k), pairs = players / 2;
  for (int e = team.rank; e < players * players; e += team.size) {
    z(e / players, e % players) = e / players == e % players ? 1.0 : 0.0;
  }
  for (int i = team.rank; i < k; i += team.size) {
    by.largest[i] = 0.0;
    for (int j = 0; j <= i; ++j) by.largest[i] = std::fmax(by.largest[i], std::fabs(a(i, j)));
  }
  if (team.rank == 0) by.flags[0] = 0.0;
  team.sync();
  double largest = 0.0;
  for (int i = 0; i < k; ++i) largest = std::fmax(largest, by.largest[i]);
  const double negligible = mul(kJacobiNegligible, largest);
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
    for (int round = 0; round < players - 1; ++round) {
      for (int m = team.rank; m < pairs; m += team.size) {
        int p, q;
        tournament_pair(players, round, m, p, q);
        if (find_rotation(a, p, q, negligible, by.cosine[m], by.sine[m], by.tangent[m])) {
          by.flags[sweep % 2] = 1.0;
        }
      }
      team.sync();
      // Nobody reads the next sweep's flag now: the last to do so did before this barrier.
      if (round == 0 && team.rank == 0) by.flags[(sweep + 1) % 2] = 0.0;
      for (int e = team.rank; e < pairs * (pairs + players); e += team.size) {
        if (e < pairs * pairs) {
          if (e / pairs <= e % pairs) rotate_block(a, by, players, round, e / pairs, e % pairs);
          continue;
        }
        const int m = (e - pairs * pairs) % pairs, i = (e - pairs * pairs) / pairs;
        int p, q;
        tournament_pair(players, round, m, p, q);
        const double zp = z(i, p), zq = z(i, q);
        z(i, p) = mul(by.cosine[m], zp) - mul(by.sine[m], zq);
        z(i, q) = mul(by.sine[m], zp) + mul(by.cosine[m], zq);
      }
      team.sync();
    }
    if (by.flags[sweep % 2] == 0.0) return;
  }
}

// out_j = u_jᵀ·source·u_j for every column of u; w is scratch.
template <class Team, class Source>
LYAPCUDA_HOST_DEVICE inline void forms(const Team& team, int k, const Source& source, Matrix u,
                                       Matrix w, double* out) {
  for (int e = team.rank; e < k * k; e += team.size) {
    const int i = e / k, j = e % k;
    double sum = 0.0;
    for (int p = 0; p < k; ++p) sum += mul(source(i, p), u(p, j));
    w(i, j) = sum;
  }
  team.sync();
  for (int j = team.rank; j < k; j += team.size) {
    double sum = 0.0;
    for (int p = 0; p < k; ++p) sum += mul(u(p, j), w(p, j));
    out[j] = sum;
  }
  team.sync();
}

}  // namespace lyapcuda
