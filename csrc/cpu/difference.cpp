// torch.ops.lyapcuda.difference_: a difference of gradients as a product of the Hessian.
#include "difference.h"

#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "difference.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

template <class T, class P, bool kDecay, bool kKeep>
void difference_typed(const Tensor& out, const std::vector<Tensor>& plus,
                      const std::vector<Tensor>& minus, const std::vector<int64_t>& offsets,
                      const std::optional<Tensor>& v, const DifferenceScalars& scalars) {
  const Blocks blocks(sizes_of(plus));
  const auto plus_data = data_of<const P>(plus), minus_data = data_of<const P>(minus);
  T* const out_data = static_cast<T*>(out.mutable_data_ptr());
  const T* const v_data = kDecay ? static_cast<const T*>(v->const_data_ptr()) : nullptr;
  blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
    const int64_t at = offsets[segment] + begin;
    const DifferenceArguments<T, P> arguments{out_data + at, plus_data[segment] + begin,
                                              minus_data[segment] + begin,
                                              kDecay ? v_data + at : nullptr};
    LYAPCUDA_DISPATCH(difference_block<T, P, kDecay, kKeep>)(arguments, length, scalars);
  });
}

void difference_(Tensor out, std::vector<Tensor> plus, std::vector<Tensor> minus,
                 std::vector<int64_t> offsets, Tensor scale, double keep, double weight_decay,
                 std::optional<Tensor> v) {
  check_buffer(out, "out");
  check_segments(plus, "plus", offsets, out);
  check_segments(minus, "minus", offsets, out);
  check_like(minus, "minus", plus, "plus");
  check_vector(scale, "scale", 1);
  if (v) check_same_buffer(*v, "v", out, "out");
  STD_TORCH_CHECK(v.has_value() || weight_decay == 0.0, "weight_decay: ", weight_decay, " needs v");
  if (plus.empty()) return;
  const DifferenceScalars scalars{*static_cast<const double*>(scale.const_data_ptr()), weight_decay,
                                  keep};
  with_buffer_and_storage(
      out.scalar_type(), plus[0].scalar_type(), [&](auto* buffer, auto* storage) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(storage)>;
        const auto run = [&](auto decays, auto keeps) {
          difference_typed<T, P, decltype(decays)::value, decltype(keeps)::value>(
              out, plus, minus, offsets, v, scalars);
        };
        if (weight_decay != 0.0) {
          keep != 0.0 ? run(std::true_type{}, std::true_type{})
                      : run(std::true_type{}, std::false_type{});
        } else {
          keep != 0.0 ? run(std::false_type{}, std::true_type{})
                      : run(std::false_type{}, std::false_type{});
        }
      });
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("difference_", TORCH_BOX(&lyapcuda::cpu::difference_));
}
