// torch.ops.lyapcuda.reseed_: another separation where the state says that one was lost.
#include "../reseed.h"

#include <torch/csrc/stable/library.h>

#include "blocks.h"
#include "tensors.h"

namespace lyapcuda::cpu {
namespace {

// A rare event: one plain loop for every instruction set.
template <class T>
void reseed_typed(const Tensor& panel, const std::vector<int64_t>& offsets,
                  const std::vector<int64_t>& sizes, const Reseed& lost,
                  const std::optional<Tensor>& p) {
  const int64_t row = lost.row * panel.size(panel.dim() - 1);
  T* const out = static_cast<T*>(panel.mutable_data_ptr()) + row;
  T* const momentum = p ? static_cast<T*>(p->mutable_data_ptr()) + row : nullptr;
  Blocks(sizes).for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t) {
    const int64_t first = offsets[segment] + begin;
    for (int64_t at = first; at < first + length; ++at) {
      out[at] = static_cast<T>(lost.element(at) * lost.size);
      if (momentum != nullptr) momentum[at] = T{0};
    }
  });
}

void reseed_(Tensor panel, std::vector<int64_t> offsets, std::vector<int64_t> sizes, Tensor state,
             int64_t elements, int64_t seed, std::optional<Tensor> p) {
  const int64_t k = reseed_rows(panel, p, state, offsets, sizes, elements, Device(DeviceType::CPU));
  const Reseed lost =
      reseed_of(static_cast<const double*>(state.const_data_ptr()), k, elements, seed);
  if (lost.row < 0) return;
  panel.scalar_type() == ScalarType::Double ? reseed_typed<double>(panel, offsets, sizes, lost, p)
                                            : reseed_typed<float>(panel, offsets, sizes, lost, p);
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("reseed_", TORCH_BOX(&lyapcuda::cpu::reseed_));
}
