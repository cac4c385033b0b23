// The other kernels in the emulator: conversions, recenter, descend, exponent, stream_copy.
#include <limits>

#include "../kernels/descend.cuh"
#include "../kernels/exponent.cuh"
#include "../kernels/recenter.cuh"
#include "../kernels/stream_copy.cuh"
#include "simt_support.h"

namespace lyapcuda::test {
namespace {

using kernels::kThreads;
using simt::Order;

template <class P>
void conversions() {
  bool reads = true, writes = true;
  for (uint32_t i = 0; i < 65536; ++i) {
    const P stored{static_cast<uint16_t>(i)};
    const float expected = value_of<float>(stored), got = kernels::widen(stored);
    reads = reads && (std::isnan(expected) ? std::isnan(got)
                                           : std::memcmp(&got, &expected, sizeof(float)) == 0);
    for (uint32_t low : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x2000u, 0x3000u, 0x7fffu,
                         0x8000u, 0x8001u, 0xb000u, 0xffffu}) {
      const float value = kernels::bits_as<float>(i << 16 | low);
      P narrowed;
      kernels::narrow(value, narrowed);
      writes = writes && (std::isnan(value) ? std::isnan(value_of<float>(narrowed))
                                            : narrowed.bits == stored_as<P>(value).bits);
    }
  }
  CHECK(reads);
  CHECK(writes);
}

// --- recenter -----------------------------------------------------------------------------------
template <class T, class P>
void recenter_case(const Layout& layout, bool committed, bool heavy) {
  std::vector<double> state = some_state();
  state[k_committed] = committed ? 1.0 : 0.0;
  Walled<T> q(layout.total, 0, 0), previous(layout.total, layout.shift, 64);  // aligned unlike q
  randomise(q);
  randomise(previous);
  Walled<T> p(layout.total, layout.shift, 0), p_previous(layout.total, 0, 64);
  randomise(p);
  randomise(p_previous);
  Tensors<P> theta(layout, true);
  const T scale = static_cast<T>(state[k_scale]);
  for (const unsigned grid : {1u, 3u, 7u}) {
    for (const Order order : kOrders) {
      Walled<T> now(layout.total, 0, 0);
      std::memcpy(now.data(), q.data(), layout.total * sizeof(T));
      Walled<T> p_now(layout.total, layout.shift, 0);
      std::memcpy(p_now.data(), p.data(), layout.total * sizeof(T));
      Tensors<P> theta1(layout, false);
      P* const* const lists[2] = {theta1.list(), theta.list()};
      kernels::for_each_table(lists, layout.sizes.data(), layout.offsets.data(), layout.count(),
                              [&](const auto& table) {
                                simt::launch(
                                    grid, kThreads, order, kernels::recenter<T, P>, table,
                                    kernels::RecenterArguments<T>{
                                        now.data(), previous.data(), heavy ? p_now.data() : nullptr,
                                        heavy ? p_previous.data() : nullptr, state.data()});
                              });
      bool right = true;
      int64_t end = 0;
      for (int64_t s = 0; s < layout.count(); ++s) {
        for (; end < layout.offsets[s]; ++end) {
          right = right && now[end] == q[end] && p_now[end] == p[end];
        }
        for (int64_t i = 0; i < layout.sizes[s]; ++i, ++end) {
          const T kept = committed ? q[end] : previous[end];
          right = right && p_now[end] == (committed || !heavy ? p[end] : p_previous[end]);
          const P out = stored_as<P>(value_of<T>(theta[s][i]) + kept * scale);
          right = right && now[end] == kept && std::memcmp(&theta1[s][i], &out, sizeof(P)) == 0;
        }
      }
      CHECK(right);
      CHECK(now.whole() && theta1.whole() && theta.whole() && previous.whole());
      CHECK(p_now.whole() && p_previous.whole());
    }
  }
}

// θ1 may be views of q_previous.
void recenter_over_previous() {
  const Layout layout({33, 4097}, 0);
  std::vector<double> state = some_state();
  state[k_committed] = 0.0;
  Walled<float> q(layout.total, 0, 0), previous(layout.total, 0, 0), before(layout.total, 0, 0);
  randomise(previous);
  std::memcpy(before.data(), previous.data(), layout.total * sizeof(float));
  Tensors<float> theta(layout, true);
  std::vector<float*> views;
  for (const int64_t offset : layout.offsets) views.push_back(previous.data() + offset);
  float* const* const lists[2] = {views.data(), theta.list()};
  kernels::for_each_table(
      lists, layout.sizes.data(), layout.offsets.data(), layout.count(), [&](const auto& table) {
        simt::launch(3, kThreads, Order::kReverse, kernels::recenter<float, float>, table,
                     kernels::RecenterArguments<float>{q.data(), previous.data(), nullptr, nullptr,
                                                       state.data()});
      });
  bool right = true;
  for (int64_t s = 0; s < layout.count(); ++s) {
    for (int64_t i = 0; i < layout.sizes[s]; ++i) {
      const int64_t at = layout.offsets[s] + i;
      const float out = theta[s][i] + before[at] * static_cast<float>(state[k_scale]);
      right = right && q[at] == before[at] && previous[at] == out;
    }
  }
  CHECK(right);
}

// --- descend ------------------------------------------------------------------------------------
template <class T, class P, Momentum kMomentum>
void descend_case(const Layout& layout, double h, bool accepted, const double* factor = nullptr) {
  std::vector<double> state = some_state();
  state[k_h_ema] = h;
  state[k_accepted] = accepted ? 1.0 : 0.0;
  const bool go = accepted && std::isfinite(h) && std::isfinite(factor_of(factor));
  const double gain = 1.5 * factor_of(factor);
  const double lr = !go ? 0.0 : h * 7.5 > 1.0 ? gain / h : gain * 7.5;
  const T rate = static_cast<T>(lr), decay = static_cast<T>(0.05), heavy = static_cast<T>(0.3);
  Tensors<P> before(layout, true), gradient(layout, true);
  Walled<T> held(layout.total, 0, 64);
  randomise(held);
  for (const unsigned grid : {1u, 3u, 7u}) {
    for (const Order order : kOrders) {
      Tensors<P> theta(layout, false);
      Walled<T> buffer(layout.total, 0, 64);
      std::memcpy(buffer.data(), held.data(), layout.total * sizeof(T));
      for (int64_t s = 0; s < layout.count(); ++s) {
        for (int64_t i = 0; i < layout.sizes[s]; ++i) theta.pointers[s][i] = before[s][i];
      }
      double used = -1.0;
      P* const* const lists[2] = {theta.list(), gradient.list()};
      kernels::for_each_table(lists, layout.sizes.data(), layout.offsets.data(), layout.count(),
                              [&](const auto& table) {
                                const kernels::DescendArguments<T> arguments{
                                    state.data(), factor, 1.5,           7.5,
                                    0.05,         0.3,    buffer.data(), &used};
                                simt::launch(grid, kThreads, order,
                                             kernels::descend<T, P, kMomentum>, table, arguments);
                              });
      CHECK(used == lr);
      bool right = true;
      Walled<T> expected(layout.total, 0, 64);
      std::memcpy(expected.data(), held.data(), layout.total * sizeof(T));
      for (int64_t s = 0; s < layout.count(); ++s) {
        for (int64_t i = 0; i < layout.sizes[s]; ++i) {
          const T here = value_of<T>(before[s][i]);
          const T g = value_of<T>(gradient[s][i]) + here * decay;
          P out = before[s][i];
          if (go) {
            T u = g;
            if (kMomentum != Momentum::kNone) {
              T& next = expected[layout.offsets[s] + i];
              next = next * heavy + g;
              u = kMomentum == Momentum::kHeavy ? next : g + next * heavy;
            }
            out = stored_as<P>(here - u * rate);
          }
          right = right && std::memcmp(&theta[s][i], &out, sizeof(P)) == 0;
        }
      }
      CHECK(right && same_bits(buffer, expected));
      CHECK(theta.whole() && gradient.whole() && buffer.whole());
    }
  }
}

template <class T, class P>
void storage_cases() {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& sizes : size_lists()) {
    for (const int64_t shift : {0, 1}) {
      const Layout layout(sizes, shift);
      for (const bool heavy : {false, true}) {
        recenter_case<T, P>(layout, true, heavy);
        recenter_case<T, P>(layout, false, heavy);
      }
      descend_case<T, P, Momentum::kNone>(layout, 3.7, true);
      descend_case<T, P, Momentum::kHeavy>(layout, 3.7, true);
      descend_case<T, P, Momentum::kNesterov>(layout, 3.7, true);
    }
  }
  const Layout small({33, 5}, 0);
  const double factor = 0.25;
  descend_case<T, P, Momentum::kNone>(small, -2.0, true);
  descend_case<T, P, Momentum::kNone>(small, 3.7, true, &factor);
  descend_case<T, P, Momentum::kNone>(Layout({}, 0), 3.7, true);
  descend_case<T, P, Momentum::kHeavy>(small, kNan, true);
  descend_case<T, P, Momentum::kHeavy>(small, 3.7, true, &kNan);
  descend_case<T, P, Momentum::kNesterov>(small, 3.7, false);
}

// --- exponent, secant ---------------------------------------------------------------------------
void scalars_are_those_of_the_header() {
  const double losses[2] = {1.0, 2.0};
  for (const double dd : {4.0, 1e-20, std::numeric_limits<double>::infinity()}) {
    const double sums[kSumSize] = {dd, 1.1, 2.5, 7.0, 1.0, 2.4};
    for (const Estimate estimate :
         {Estimate::kRayleigh, Estimate::kGrowth, Estimate::kPaper, Estimate::kSchwarz}) {
      const ExponentOptions options{1.0, estimate, 0.5, true, true, 0.9};
      std::vector<double> expected = some_state(), state = some_state();
      for (int step = 0; step < 3; ++step) {
        exponent_step(expected.data(), sums, losses, 2, options);
        simt::launch(1, 32, Order::kReverse, kernels::exponent, state.data(), sums, losses,
                     int64_t{2}, options);
        CHECK(std::memcmp(state.data(), expected.data(), sizeof(double) * kStateSize) == 0);
      }
      if (usable(sums)) secant_rate(expected.data(), quotient(sums), -1.0);
      simt::launch(1, 32, Order::kForward, kernels::secant, state.data(), sums, -1.0);
      CHECK(std::memcmp(state.data(), expected.data(), sizeof(double) * kStateSize) == 0);
    }
  }
}

// --- stream_copy --------------------------------------------------------------------------------
void copies() {
  for (const int64_t n : {0, 1, 31, 33, 255, 257, 4097, 20011}) {
    for (const int64_t shift : {0, 1}) {
      Walled<float> from(n, shift, 0);
      randomise(from);
      for (const unsigned grid : {1u, 3u, 7u}) {
        for (const Order order : kOrders) {
          Walled<float> to(n, 0, grid == 3 ? 0 : 64);
          simt::launch(grid, kThreads, order, kernels::stream_copy, to.data(), from.data(), n);
          CHECK(same_bits(to, from) && to.whole() && from.whole());
        }
      }
    }
  }
}

}  // namespace

void simt_kernel_tests() {
  conversions<kernels::BFloat16>();
  conversions<kernels::Half>();
  storage_cases<float, float>();
  storage_cases<float, kernels::BFloat16>();
  storage_cases<float, kernels::Half>();
  storage_cases<double, double>();
  recenter_over_previous();
  scalars_are_those_of_the_header();
  copies();
}

}  // namespace lyapcuda::test
