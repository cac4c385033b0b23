// Ops on the CPU: their types, and the elementwise driver. The CUDA backend has the same names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../ops/lists.h"
#include "../scalars/newton.h"
#include "blocks.h"
#include "panel.h"
#include "targets.h"

namespace lyapcuda::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

inline Device device_of(const Tensor& tensor, const char* name) {
  check_device(tensor, name, Device(DeviceType::CPU));
  return Device(DeviceType::CPU);
}

// Calls f with null pointers of the buffers' type and of the storage type beside it.
template <class F>
void with_buffer_and_storage(ScalarType buffer, ScalarType storage, F&& f) {
  with_types<BFloat16, Half>(buffer, storage, f);
}

// Where ops run: nothing to know on the CPU.
struct Launcher {
  Launcher(const Device&, const Tensor&) {}
};

// One block of an elementwise op: n elements of every stream, the lists' from their pointers on,
// those of flat buffers from `at` on.
template <class Arguments, class P>
using ElementwiseBlock = void(const Arguments&, P* const* lists, int64_t at, int64_t n,
                              bool around_cache, double* sums);

// Runs an elementwise op over all segments; its sums end in out.
template <class Arguments, class P, int kLists>
void elementwise(const Lists<P, kLists>& lists, const Arguments& arguments, double* out,
                 ElementwiseBlock<Arguments, P>* block) {
  arguments.note();
  if (!arguments.go()) return;
  constexpr int64_t kSums = Arguments::kSums;
  const Blocks blocks(lists.sizes);
  const bool large = blocks.elements() > kAroundCache;
  std::vector<double> partial(std::max<int64_t>(blocks.count(), 1) * kSums, 0.0);
  blocks.for_each([&](int64_t segment, int64_t begin, int64_t length, int64_t number) {
    P* here[kLists];
    for (int list = 0; list < kLists; ++list) here[list] = lists.data[list][segment] + begin;
    const int64_t at = (lists.offsets.empty() ? 0 : lists.offsets[segment]) + begin;
    const void* const output = arguments.output(at);
    const bool around_cache =
        large && output != nullptr && reinterpret_cast<uintptr_t>(output) % 64 == 0;
    block(arguments, here, at, length, around_cache, partial.data() + number * kSums);
  });
  if constexpr (kSums > 0) {
    tree_sum(partial.data(), blocks.count(), kSums);
    arguments.finish(partial.data(), out);
  }
}

}  // namespace lyapcuda::cpu

// Runs the elementwise op that is named last.
#define LYAPCUDA_ELEMENTWISE(launcher, name, lists, arguments, out, ...) \
  ::lyapcuda::cpu::elementwise(lists, arguments, out,                    \
                               LYAPCUDA_DISPATCH_OF(elementwise_block, __VA_ARGS__))
