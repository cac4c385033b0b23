// torch.ops.lyapcuda.combine_: combinations of the rows of a panel.
#ifdef LYAPCUDA_ELEMENT

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/combine.inc"
#endif

#else

#include "op.h"

#define LYAPCUDA_SOURCE "../ops/combine.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/combine.h"
#else
#include "../cpu/combine.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

void combine_(Tensor out, Tensor panel, Tensor matrix, std::optional<Tensor> gate) {
  const Device device = device_of(panel, "panel");
  check_panel(panel, "panel", kMaxRows, device);
  check_panel(out, "out", kMaxRows, device);
  check_row_length(out, "out", panel, "panel");
  check_matrix(matrix, "matrix", panel.size(0), out.size(0), device);
  check_gate(gate, device);
  STD_TORCH_CHECK(!overlap(out, panel) || (out.const_data_ptr() == panel.const_data_ptr() &&
                                           out.size(0) <= panel.size(0)),
                  "out: shares memory with panel, but only from its first row on, and with no more "
                  "rows, may it do so (",
                  out.size(0), " rows, panel has ", panel.size(0), ")");
  if (out.size(1) == 0) return;
  const Launcher launcher(device, matrix);
  with_buffer_and_storage(panel.scalar_type(), panel.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    combine<T>(launcher, out, panel, read<double>(matrix), read<double>(gate));
  });
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(combine_, "(Tensor(a!) out, Tensor panel, Tensor matrix, *, Tensor? gate=None) -> ()")

#endif
