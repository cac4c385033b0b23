// Ops on CUDA: their types, and the elementwise driver. The CPU backend has the same names.
#pragma once

#include "launch.h"

#include "../kernels/elementwise.cuh"
#include "../ops/lists.h"

namespace lyapcuda::cuda {

// Calls launch(table, blocks, before) for every table of segments: each block of a launch leaves a
// row of sums, and `before` rows were left by the launches before. Returns how many rows there are.
template <class P, int kLists, class F>
int64_t for_each_launch(const Launcher& launcher, const Lists<P, kLists>& lists, int held,
                        const F& launch, int64_t chunk = kernels::kChunk<P>) {
  P* const* data[kLists];
  for (int list = 0; list < kLists; ++list) data[list] = lists.data[list].data();
  int64_t count = 0;
  kernels::for_each_table(
      data, lists.sizes.data(), lists.offsets.empty() ? nullptr : lists.offsets.data(),
      lists.count(),
      [&](const kernels::Segments<P, kLists>& table) {
        const int64_t blocks = blocks_for(launcher, chunks_of(table), held);
        launch(table, blocks, count);
        count += blocks;
      },
      chunk);
  return count;
}

// Memory for the rows of sums that the blocks of all launches leave behind.
inline Tensor scratch_rows(const Launcher& launcher, int64_t tensors, int held, int64_t width) {
  return new_doubles(launcher.beside(), {most_blocks(launcher, tensors, held), width});
}

// Runs an elementwise op over all segments; its sums end in out.
template <class Op, class P, int kLists>
void elementwise(const Launcher& launcher, const char* name, const Lists<P, kLists>& lists,
                 const typename Op::Arguments& arguments, double* out) {
  using Arguments = typename Op::Arguments;
  constexpr int kSums = Arguments::kSums, kHeld = Arguments::kBlocks;
  std::optional<Tensor> scratch;
  double* rows = nullptr;
  if constexpr (kSums > 0) {
    scratch = scratch_rows(launcher, lists.count(), kHeld, kSums);
    rows = written<double>(*scratch);
  }
  const int64_t count = for_each_launch(
      launcher, lists, kHeld,
      [&](const kernels::Segments<P, kLists>& table, int64_t blocks, int64_t first) {
        launcher.run(name, kernels::elementwise<Op>, blocks, kernels::kThreads, table, arguments,
                     rows + first * kSums);
      });
  if constexpr (kSums > 0) {
    const double* const to_add = rows;
    launcher.run(name, kernels::elementwise_finish<Arguments>, 1, kernels::kThreads, to_add, count,
                 arguments, out);
  }
}

}  // namespace lyapcuda::cuda

// Runs the elementwise op that is named last.
#define LYAPCUDA_ELEMENTWISE(launcher, name, lists, arguments, out, ...)                 \
  ::lyapcuda::cuda::elementwise<::lyapcuda::kernels::__VA_ARGS__>(launcher, name, lists, \
                                                                  arguments, out)
