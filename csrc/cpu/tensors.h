// The checks of csrc/tensors.h for the CPU, and the types its ops work on.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../tensors.h"

namespace lyapcuda::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// The same arguments, without the device.
#define LYAPCUDA_ON_THE_CPU(check)                          \
  template <class... A>                                     \
  void check(const A&... arguments) {                       \
    lyapcuda::check(arguments..., Device(DeviceType::CPU)); \
  }
LYAPCUDA_ON_THE_CPU(check_buffer)
LYAPCUDA_ON_THE_CPU(check_same_buffer)
LYAPCUDA_ON_THE_CPU(check_vector)
LYAPCUDA_ON_THE_CPU(check_matrix)
LYAPCUDA_ON_THE_CPU(check_panel)
LYAPCUDA_ON_THE_CPU(check_same_panel)
LYAPCUDA_ON_THE_CPU(check_storage_panel)
LYAPCUDA_ON_THE_CPU(check_segments)
LYAPCUDA_ON_THE_CPU(check_gate)
#undef LYAPCUDA_ON_THE_CPU

// A gate on the device: where it is 0 there is nothing to do.
inline bool is_open(const std::optional<Tensor>& gate) {
  return !gate || *static_cast<const double*>(gate->const_data_ptr()) != 0.0;
}

template <class F>
void with_buffer_and_storage(ScalarType buffer, ScalarType storage, F&& f) {
  with_types<BFloat16, Half>(buffer, storage, f);
}

}  // namespace lyapcuda::cpu
