// torch.ops.lyapcuda.displace_: θ + step·v, and what of it the parameters' dtype realised.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "displace.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

Tensor displace_(std::vector<Tensor> copies, Tensor v, std::vector<Tensor> theta,
                 std::vector<int64_t> offsets, Tensor step) {
  check_buffer(v, "v");
  check_segments(theta, "theta", offsets, v);
  check_segments(copies, "copies", offsets, v);
  check_like(copies, "copies", theta, "theta");
  check_vector(step, "step", 1);

  Tensor sums = torch::stable::new_empty(step, {2});
  double* const out = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(out, 2, 0.0);
  if (theta.empty()) return sums;
  const double distance = *static_cast<const double*>(step.const_data_ptr());
  const Blocks blocks(sizes_of(theta));
  std::vector<double> partial(std::max<int64_t>(blocks.count(), 1) * 2, 0.0);
  with_buffer_and_storage(
      v.scalar_type(), theta[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        const auto copies_data = data_of<P>(copies);
        const auto theta_data = data_of<const P>(theta);
        const T* const v_data = static_cast<const T*>(v.const_data_ptr());
        blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t block) {
          LYAPCUDA_DISPATCH(displace_block<T, P>)
          (copies_data[segment] + begin, v_data + offsets[segment] + begin,
           theta_data[segment] + begin, length, distance, partial.data() + block * 2);
        });
      });
  tree_sum(partial.data(), blocks.count(), 2);
  std::copy_n(partial.begin(), 2, out);
  return sums;
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("displace_", TORCH_BOX(&lyapcuda::cpu::displace_));
}
