// torch.ops.lyapcuda.stream_copy_ on CUDA: the yardstick of bench/.
#include "../kernels/stream_copy.cuh"

#include "launch.h"

namespace lyapcuda::cuda {
namespace {

void stream_copy_(Tensor destination, Tensor source) {
  const Device device = device_of(source, "source");
  check_buffer(source, "source", device);
  check_same_buffer(destination, "destination", source, "source", device);
  const int64_t words =
      source.numel() * (source.scalar_type() == ScalarType::Double ? 2 : 1);  // of 4 bytes
  constexpr int64_t kAtOnce = kernels::kThreads * 4 * kernels::kCopiesInFlight;
  const Launcher launcher(device);
  launcher.run("stream_copy_", kernels::stream_copy,
               blocks_for(launcher, ceil_div(words, kAtOnce), 8), kernels::kThreads,
               written<float>(destination), read<float>(source), words);
}

}  // namespace
}  // namespace lyapcuda::cuda

STABLE_TORCH_LIBRARY_IMPL(LYAPCUDA_LIBRARY, LYAPCUDA_KEY, m) {
  m.impl("stream_copy_", TORCH_BOX(&lyapcuda::cuda::stream_copy_));
}
