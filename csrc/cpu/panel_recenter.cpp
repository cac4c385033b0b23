// torch.ops.lyapcuda.panel_recenter_: the next separations from what the step left, and the copies
// put back at their distance from the parameters.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "panel.h"
#include "tensors.h"

#define LYAPCUDA_BODY "panel_recenter.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T, class P>
void panel_recenter_typed(const Tensor& q, const Tensor& copies, const Tensor& d,
                          const std::vector<Tensor>& theta, const std::vector<int64_t>& offsets,
                          const double* state) {
  const int64_t k = q.size(0), row = q.size(1);
  const bool pending = state[panel_offset(PanelScalar::pending)] != 0.0;
  const double* const transform = state + panel_offset(PanelMatrix::transform, k);
  const std::vector<T> coefficients(transform, transform + k * k);
  const Blocks blocks(sizes_of(theta), kPanelBlock);
  const auto theta_data = data_of<const P>(theta);
  T* const q_data = static_cast<T*>(q.mutable_data_ptr());
  P* const copies_data = static_cast<P*>(copies.mutable_data_ptr());
  const T* const d_data = static_cast<const T*>(d.const_data_ptr());
  blocks.for_each_run(k, [&](int64_t, const auto& visit) {
    Aligned<T> tile(k * combine_tile(k));
    visit([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
      const int64_t at = offsets[segment] + begin;
      const PanelRecenterArguments<T, P> arguments{
          {q_data + at, d_data + at, coefficients.data(), k, k, row},
          copies_data + at,
          theta_data[segment] + begin,
          pending};
      LYAPCUDA_DISPATCH(panel_recenter_block<T, P>)(arguments, length, tile.data());
    });
  });
}

void panel_recenter_(Tensor q, Tensor copies, Tensor d, std::vector<Tensor> theta,
                     std::vector<int64_t> offsets, Tensor state) {
  check_panel(q, "q", kMaxPanel);
  check_same_panel(d, "d", q, "q");
  check_segments(theta, "theta", offsets, q);
  check_storage_panel(copies, "copies", q, "q", theta, "theta");
  check_vector(state, "state", panel_size(q.size(0)));
  STD_TORCH_CHECK(!overlap(q, d), "q: shares memory with d");
  STD_TORCH_CHECK(!overlap(q, copies), "q: shares memory with copies");
  check_over(copies, "copies", d, "d");
  if (theta.empty()) return;
  const double* const values = static_cast<const double*>(state.const_data_ptr());
  with_buffer_and_storage(q.scalar_type(), theta[0].scalar_type(),
                          [&](auto* buffer, auto* storage) {
                            using T = std::remove_pointer_t<decltype(buffer)>;
                            using P = std::remove_pointer_t<decltype(storage)>;
                            panel_recenter_typed<T, P>(q, copies, d, theta, offsets, values);
                          });
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("panel_recenter_", TORCH_BOX(&lyapcuda::cpu::panel_recenter_));
}
