// torch.ops.lyapcuda.ascent_: the step of both copies, seen from their separation, in one pass.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <limits>

#include "ascent.h"
#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "ascent.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T, class P, bool kRealised, bool kMomentum>
void ascent_typed(const Tensor& d, const Tensor& q, const std::vector<Tensor>& g0,
                  const std::vector<Tensor>& g1, const std::vector<int64_t>& offsets,
                  const std::vector<Tensor>& theta, const std::optional<Tensor>& p,
                  const std::optional<Tensor>& p_next, const AscentScalars& scalars, double* sums) {
  const Blocks blocks(sizes_of(g0));
  const auto g0_data = data_of<const P>(g0), g1_data = data_of<const P>(g1);
  const auto theta_data = data_of<const P>(theta);
  const T* const p_data = kMomentum ? static_cast<const T*>(p->const_data_ptr()) : nullptr;
  T* const p_next_data = kMomentum ? static_cast<T*>(p_next->mutable_data_ptr()) : nullptr;
  T* const d_data = static_cast<T*>(d.mutable_data_ptr());
  const T* const q_data = static_cast<const T*>(q.const_data_ptr());
  // In place, q's read has already brought d's lines in; and streaming needs aligned lines.
  const bool large = d_data != q_data && blocks.elements() > kAroundCache;
  std::vector<double> partial(std::max<int64_t>(blocks.count(), 1) * kSumSize, 0.0);
  blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t block) {
    const int64_t at = offsets[segment] + begin;
    const AscentArguments<T, P> arguments{d_data + at,
                                          q_data + at,
                                          g0_data[segment] + begin,
                                          g1_data[segment] + begin,
                                          kRealised ? theta_data[segment] + begin : nullptr,
                                          kMomentum ? p_data + at : nullptr,
                                          kMomentum ? p_next_data + at : nullptr};
    const bool around_cache = large && reinterpret_cast<uintptr_t>(arguments.d) % 64 == 0;
    double* const sums_of_block = partial.data() + block * kSumSize;
    if (around_cache) {
      LYAPCUDA_DISPATCH(ascent_block<T, P, kRealised, kMomentum, true>)
      (arguments, length, scalars, sums_of_block);
    } else {
      LYAPCUDA_DISPATCH(ascent_block<T, P, kRealised, kMomentum, false>)
      (arguments, length, scalars, sums_of_block);
    }
  });
  tree_sum(partial.data(), blocks.count(), kSumSize);
  std::copy_n(partial.begin(), static_cast<int64_t>(kSumSize), sums);
  if constexpr (!kRealised) {
    sums[kSumCarriedQ] = sums[kSumQQ];
    sums[kSumCarriedY] = sums[kSumQY];
  }
  if constexpr (!kSumsD<T, kRealised, kMomentum>) {
    // ‖q + b·y‖² follows from the other sums: one accumulation less in the loop. Rounding can only
    // bring it below zero where d is nothing but rounding.
    const double b = scalars.rate;
    // (In this order max lets a NaN through.)
    sums[kSumDD] = std::max(sums[kSumQQ] + 2.0 * b * sums[kSumQY] + b * b * sums[kSumYY], 0.0);
  }
  // An element of d may then not fit T: it is not to be taken for a separation.
  constexpr double largest = std::numeric_limits<T>::max();
  if (!(std::sqrt(sums[kSumDD]) < largest)) sums[kSumDD] = std::numeric_limits<double>::infinity();
}

Tensor ascent_(Tensor d, Tensor q, std::vector<Tensor> g0, std::vector<Tensor> g1,
               std::vector<int64_t> offsets, Tensor state, int64_t sign, double weight_decay,
               std::optional<std::vector<Tensor>> theta, double momentum, std::optional<Tensor> p,
               std::optional<Tensor> p_next) {
  check_buffer(q, "q");
  check_same_buffer(d, "d", q, "q");
  check_segments(g0, "g0", offsets, q);
  check_segments(g1, "g1", offsets, q);
  check_like(g1, "g1", g0, "g0");
  check_vector(state, "state", kStateSize);
  check_sign(sign);
  check_both(p, "p", p_next, "p_next");
  STD_TORCH_CHECK(p.has_value() || momentum == 0.0, "momentum: ", momentum, " needs p and p_next");
  if (theta) {
    check_like(*theta, "theta", g0, "g0");
    check_segments(*theta, "theta", offsets, q);
  }
  if (p) {
    check_same_buffer(*p, "p", q, "q");
    check_same_buffer(*p_next, "p_next", q, "q");
  }

  const double* values = static_cast<const double*>(state.const_data_ptr());
  const AscentScalars scalars{values[k_scale], static_cast<double>(sign) * values[k_beta],
                              weight_decay, momentum};
  Tensor sums = torch::stable::new_empty(state, {kSumSize});
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(out, static_cast<int64_t>(kSumSize), 0.0);
  if (g0.empty()) return sums;
  const std::vector<Tensor> none;
  with_buffer_and_storage(q.scalar_type(), g0[0].scalar_type(), [&](auto* buffer, auto* storage) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(storage)>;
    const auto run = [&](auto realised, auto heavy) {
      ascent_typed<T, P, decltype(realised)::value, decltype(heavy)::value>(
          d, q, g0, g1, offsets, theta ? *theta : none, p, p_next, scalars, out);
    };
    if (theta) {
      p ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
    } else {
      p ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
    }
  });
  return sums;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("ascent_", TORCH_BOX(&lyapcuda::cpu::ascent_));
}
