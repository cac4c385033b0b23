// What tests/support/simt_library.py sets in the library that it builds.
#include "../../csrc/cuda/launch.h"

extern "C" __attribute__((visibility("default"))) void lyapcuda_simt_set(int reverse,
                                                                         int processors) {
  lyapcuda::cuda::simt_order = reverse ? simt::Order::kReverse : simt::Order::kForward;
  lyapcuda::cuda::simt_processors = processors;
}
