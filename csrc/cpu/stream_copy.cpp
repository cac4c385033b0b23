// torch.ops.lyapcuda.stream_copy_: the copy whose bandwidth the other ops are measured against.
#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"
#include "tensors.h"

#define LYAPCUDA_BODY "stream_copy.inc"
#include "for_each_target.h"

namespace lyapcuda::cpu {
namespace {

void stream_copy_(Tensor destination, Tensor source) {
  check_buffer(source, "source");
  check_same_buffer(destination, "destination", source, "source");
  const int64_t words =
      source.numel() * (source.scalar_type() == ScalarType::Double ? 2 : 1);  // of 4 bytes
  const Blocks blocks({words});
  float* const to = static_cast<float*>(destination.mutable_data_ptr());
  const float* const from = static_cast<const float*>(source.const_data_ptr());
  blocks.for_each([&](int64_t, int64_t begin, int64_t length, int64_t) {
    const bool around_cache =
        words > kAroundCache && reinterpret_cast<uintptr_t>(to + begin) % 64 == 0;
    LYAPCUDA_DISPATCH(stream_copy_block)(to + begin, from + begin, length, around_cache);
  });
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("stream_copy_", TORCH_BOX(&lyapcuda::cpu::stream_copy_));
}
