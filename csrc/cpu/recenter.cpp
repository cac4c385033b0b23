// torch.ops.lyapcuda.recenter_: the second copy, put back at its distance from the first.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>

#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "recenter.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

void recenter_(std::vector<Tensor> theta1, Tensor q, Tensor q_previous, std::vector<Tensor> theta,
               std::vector<int64_t> offsets, Tensor state, std::optional<Tensor> p,
               std::optional<Tensor> p_previous) {
  check_buffer(q, "q");
  check_same_buffer(q_previous, "q_previous", q, "q");
  check_segments(theta, "theta", offsets, q);
  check_segments(theta1, "theta1", offsets, q);
  check_like(theta1, "theta1", theta, "theta");
  check_vector(state, "state", kStateSize);
  check_both(p, "p", p_previous, "p_previous");
  if (p) {
    check_same_buffer(*p, "p", q, "q");
    check_same_buffer(*p_previous, "p_previous", q, "q");
  }
  if (theta.empty()) return;
  const double* values = static_cast<const double*>(state.const_data_ptr());
  const double scale = values[k_scale];
  const bool kept = values[k_committed] != 0.0;
  const Blocks blocks(sizes_of(theta));
  with_buffer_and_storage(
      q.scalar_type(), theta[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        T* const q_data = static_cast<T*>(q.mutable_data_ptr());
        const auto theta1_data = data_of<P>(theta1);
        const auto theta_data = data_of<const P>(theta);
        const T* const previous = static_cast<const T*>(q_previous.const_data_ptr());
        const bool heavy = p && !kept;  // else the momentum is where it belongs
        T* const p_data = heavy ? static_cast<T*>(p->mutable_data_ptr()) : nullptr;
        const T* const p_from =
            heavy ? static_cast<const T*>(p_previous->const_data_ptr()) : nullptr;
        blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
          P* const out = theta1_data[segment] + begin;
          const P* const in = theta_data[segment] + begin;
          const int64_t at = offsets[segment] + begin;
          const bool around_cache =
              blocks.elements() > kAroundCache && reinterpret_cast<uintptr_t>(out) % 64 == 0;
          LYAPCUDA_DISPATCH(recenter_block<T, P>)(out, q_data + at, previous + at, in, length,
                                                  scale, kept, around_cache);
          if (heavy) std::copy_n(p_from + at, length, p_data + at);
        });
      });
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("recenter_", TORCH_BOX(&lyapcuda::cpu::recenter_));
}
