// torch.ops.lyapcuda.gram: all products of the rows of two panels.
#ifdef LYAPCUDA_ELEMENT

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/gram.inc"
#endif

#else

#include "op.h"

#define LYAPCUDA_SOURCE "../ops/gram.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/gram.h"
#else
#include "../cpu/gram.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor gram(Tensor a, Tensor b, std::optional<Tensor> gate, std::optional<Tensor> weights) {
  const Device device = device_of(a, "a");
  check_panel(a, "a", kMaxRows, device);
  check_panel(b, "b", kMaxRows, device);
  check_row_length(b, "b", a, "a");
  check_gate(gate, device);
  if (weights) check_shared_row(*weights, "weights", a, "a", device);
  const Tensor out = new_doubles(a, {a.size(0), b.size(0)});
  const Launcher launcher(device, a);
  with_buffer_and_storage(a.scalar_type(), a.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    products<T>(launcher, a, b, read<double>(gate), read<T>(weights), written<double>(out));
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(gram, "(Tensor a, Tensor b, *, Tensor? gate=None, Tensor? weights=None) -> Tensor")

#endif
