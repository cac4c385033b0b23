// What tests/support/simt_library.py sets in the library that it builds.
#include "../../csrc/cuda/launch.h"

#define SWITCH extern "C" __attribute__((visibility("default"))) void

// Of the warps of a block, as in simt::Order; how many processors there seem to be.
SWITCH lyapcuda_simt_set(int order, int processors) {
  lyapcuda::cuda::simt_order = static_cast<simt::Order>(order);
  lyapcuda::cuda::simt_processors = processors;
}

// The next launch but `launch` does without its barrier of that number; none where it is negative.
SWITCH lyapcuda_simt_missing(int launch, int barrier) { simt::missing_barrier = {launch, barrier}; }

// Only so many blocks of a launch are run, its last ones; 0: all.
SWITCH lyapcuda_simt_last_blocks(unsigned count) { simt::last_blocks = count; }
