// What the CUDA ops share: where they run, and how kernels are launched. No op waits for the
// device, and scratch memory is torch's, so that all of them can be captured in a CUDA graph.
#pragma once

#ifdef __CUDACC__
#define USE_CUDA  // torch's C interface then declares aoti_torch_get_current_cuda_stream
#include <cuda_runtime.h>
#if CUDART_VERSION < 12010
#error "lyapcuda needs CUDA 12.1 or later: before, a kernel's arguments had 4 KB at most"
#endif
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "../kernels/segments.cuh"
#include "../ops/checks.h"
#include "../simt/simt.h"
#include "build.h"
#include "errors.h"

namespace lyapcuda::cuda {

// Where an op runs, by one of its tensors.
inline Device device_of(const Tensor& tensor, const char* name) {
#ifdef __CUDACC__
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor, got one on ",
                  device_name(tensor.device()));
  return tensor.device();
#else
  check_device(tensor, name, Device(DeviceType::CPU));
  return Device(DeviceType::CPU);
#endif
}

// As with_types, with the kernels' types.
template <class F>
void with_buffer_and_storage(ScalarType buffer, ScalarType storage, F&& f) {
  with_types<kernels::BFloat16, kernels::Half>(buffer, storage, f);
}

#ifdef __CUDACC__

static_assert(kInsufficientDriver == int{cudaErrorInsufficientDriver});
static_assert(kCallRequiresNewerDriver == int{cudaErrorCallRequiresNewerDriver});
static_assert(kInvalidDeviceFunction == int{cudaErrorInvalidDeviceFunction});
static_assert(kNoKernelImageForDevice == int{cudaErrorNoKernelImageForDevice});
static_assert(kUnsupportedPtxVersion == int{cudaErrorUnsupportedPtxVersion});

// Of the current device; {0, 0} where the driver doesn't tell.
inline Gpu current_gpu() {
  Gpu gpu{0, 0};
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&gpu.minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  return gpu;
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  const std::string told = advice(error, current_gpu(), built_for(), toolkit_version());
  cudaGetLastError();  // else the next call of anyone would report it again
  STD_TORCH_CHECK(false, what, ": ", told.empty() ? std::string(cudaGetErrorString(error)) : told);
}

// Asked of the driver once a device.
inline int processor_count(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool kept = device < kDevices;
  int count = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "the number of multiprocessors");
    if (kept) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Makes a device current while it lives, and launches on the stream that torch has current there.
// Scratch memory is made like `beside`, one of the op's tensors.
class Launcher {
 public:
  Launcher(const Device& device, const Tensor& beside)
      : guard_(device.index()), beside_(beside), processors_(processor_count(device.index())) {
    void* stream = nullptr;
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(device.index(), &stream);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch has no current stream on ",
                    device_name(device));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int processors() const { return processors_; }
  const Tensor& beside() const { return beside_; }

  template <class... P, class... A>
  void run(const char* name, void (*kernel)(P...), int64_t blocks, int threads,
           A&&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...), name);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor beside_;
  int processors_;
  cudaStream_t stream_ = nullptr;
};

#else

// What the tests set: the order in which warps run, and how many processors there seem to be.
inline simt::Order simt_order = simt::Order::kForward;
inline int simt_processors = 2;

class Launcher {
 public:
  Launcher(const Device&, const Tensor& beside) : beside_(beside) {}
  int processors() const { return simt_processors; }
  const Tensor& beside() const { return beside_; }

  template <class... P, class... A>
  void run(const char*, void (*kernel)(P...), int64_t blocks, int threads, A&&... arguments) const {
    simt::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), simt_order, kernel,
                 std::forward<A>(arguments)...);
  }

 private:
  Tensor beside_;
};

#endif

// Blocks for so many chunks of work: one each, until `held` of them fill every processor.
inline int64_t blocks_for(const Launcher& launcher, int64_t chunks, int held) {
  return std::max<int64_t>(std::min<int64_t>(chunks, int64_t{launcher.processors()} * held), 1);
}

template <class Table>
int64_t chunks_of(const Table& table) {
  return table.first_chunk[table.count];
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks as all launches over tables of so many tensors have at most: what leaves rows of
// sums behind asks for memory for that many.
inline int64_t most_blocks(const Launcher& launcher, int64_t tensors, int held) {
  const int64_t tables = ceil_div(tensors, kernels::kMaxSegments);
  return std::max<int64_t>(tables, 1) * launcher.processors() * held;
}

}  // namespace lyapcuda::cuda
