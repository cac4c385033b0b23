// torch.ops.lyapcuda.project_: takes the rows of a panel out of a vector, and multiplies what is
// left with them.
#ifdef LYAPCUDA_ELEMENT

#ifndef LYAPCUDA_ON_CUDA
#include "../cpu/project.inc"
#endif

#else

#include "op.h"

#define LYAPCUDA_SOURCE "../ops/project.cpp"
#include "arithmetic.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/project.h"
#else
#include "../cpu/project.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor project_(Tensor w, Tensor v, Tensor coefficients) {
  const Device device = device_of(w, "w");
  check_buffer(w, "w", device);
  STD_TORCH_CHECK(v.scalar_type() == w.scalar_type(), "v: dtype ", dtype_name(v.scalar_type()),
                  " differs from w's ", dtype_name(w.scalar_type()));
  STD_TORCH_CHECK(v.dim() == 2 && v.is_contiguous(), "v: expected a contiguous 2-D ",
                  tensor_on(device), ", got ", v.dim(), " dimensions");
  check_device(v, "v", device);
  STD_TORCH_CHECK(v.size(0) <= kMaxRows, "v: ", v.size(0), " rows, expected at most ", kMaxRows);
  check_row_length(v, "v", w, "w");
  check_vector(coefficients, "coefficients", v.size(0), device);
  STD_TORCH_CHECK(!overlap(w, v), "w: shares memory with v");
  const Tensor out = new_doubles(coefficients, {v.size(0) + 1});
  const Launcher launcher(device, coefficients);
  with_buffer_and_storage(w.scalar_type(), w.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    project<T>(launcher, w, v, read<double>(coefficients), written<double>(out));
  });
  return out;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(project_, "(Tensor(a!) w, Tensor v, Tensor coefficients) -> Tensor")

#endif
