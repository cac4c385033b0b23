// Argument checks shared by the CPU ops. Each error names the argument and what it was.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <string>
#include <vector>

#include "../state.h"

namespace lyapcuda::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline bool is_buffer_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

// What may be stored beside a buffer of dtype `buffer`: its own type, and 16-bit floats beside
// fp32.
inline bool is_storage_dtype(ScalarType dtype, ScalarType buffer) {
  return dtype == buffer || (buffer == ScalarType::Float &&
                             (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half));
}

inline void check_buffer(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_buffer_dtype(tensor.scalar_type()), name,
                  ": expected float32 or float64, got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name,
                  ": expected a contiguous 1-D tensor, got ", tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_same_buffer(const Tensor& tensor, const char* name, const Tensor& like,
                              const char* like_name) {
  check_buffer(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": dtype ",
                  dtype_name(tensor.scalar_type()), " differs from ", like_name, "'s ",
                  dtype_name(like.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == like.numel(), name, ": ", tensor.numel(), " elements, but ",
                  like_name, " has ", like.numel());
}

inline void check_vector(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.is_cpu(), name,
      ": expected a contiguous float64 CPU tensor, got ", dtype_name(tensor.scalar_type()));
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size) {
  check_vector(tensor, name);
  STD_TORCH_CHECK(tensor.numel() == size, name, ": expected ", size, " elements, got ",
                  tensor.numel());
}

inline void check_sign(int64_t sign) {
  STD_TORCH_CHECK(sign == 1 || sign == -1, "sign: expected 1 (ascent) or -1 (descent), got ", sign);
}

// A list of tensors that lie at `offsets` of a flat buffer.
inline void check_segments(const std::vector<Tensor>& list, const char* name,
                           const std::vector<int64_t>& offsets, const Tensor& flat) {
  STD_TORCH_CHECK(list.size() == offsets.size(), name, ": ", list.size(),
                  " tensors, but offsets has ", offsets.size(), " entries");
  for (size_t i = 0; i < list.size(); ++i) {
    const ScalarType dtype = list[i].scalar_type();
    STD_TORCH_CHECK(list[i].is_cpu() && list[i].is_contiguous(), name, "[", i,
                    "]: expected a contiguous CPU tensor");
    STD_TORCH_CHECK(is_storage_dtype(dtype, flat.scalar_type()), name, "[", i, "]: dtype ",
                    dtype_name(dtype), " can't go with a ", dtype_name(flat.scalar_type()),
                    " buffer");
    STD_TORCH_CHECK(dtype == list[0].scalar_type(), name, "[", i, "]: dtype ", dtype_name(dtype),
                    " differs from ", name, "[0]'s ", dtype_name(list[0].scalar_type()));
    const int64_t numel = list[i].numel();
    // In order and apart: two threads would write what two segments share.
    STD_TORCH_CHECK(i == 0 || offsets[i] >= offsets[i - 1] + list[i - 1].numel(), "offsets[", i,
                    "]: ", offsets[i], " lies inside or before the segment of ", name, "[", i - 1,
                    "]");
    STD_TORCH_CHECK(offsets[i] >= 0 && numel <= flat.numel() && offsets[i] <= flat.numel() - numel,
                    "offsets[", i, "]: ", offsets[i], " + ", numel, " elements of ", name,
                    " don't fit a buffer of ", flat.numel());
  }
}

inline void check_like(const std::vector<Tensor>& list, const char* name,
                       const std::vector<Tensor>& like, const char* like_name) {
  STD_TORCH_CHECK(list.size() == like.size(), name, ": ", list.size(), " tensors, but ", like_name,
                  " has ", like.size());
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(list[i].numel() == like[i].numel(), name, "[", i, "]: ", list[i].numel(),
                    " elements, but ", like_name, "[", i, "] has ", like[i].numel());
    STD_TORCH_CHECK(list[i].scalar_type() == like[i].scalar_type(), name, "[", i, "]: dtype ",
                    dtype_name(list[i].scalar_type()), " differs from ", like_name, "'s ",
                    dtype_name(like[i].scalar_type()));
  }
}

// The data of a list, asked for before threads start: a copy-on-write tensor copies itself then.
template <class T>
std::vector<T*> data_of(const std::vector<Tensor>& list) {
  std::vector<T*> pointers;
  for (const Tensor& tensor : list) {
    if constexpr (std::is_const_v<T>) {
      pointers.push_back(static_cast<T*>(tensor.const_data_ptr()));
    } else {
      pointers.push_back(static_cast<T*>(tensor.mutable_data_ptr()));
    }
  }
  return pointers;
}

inline std::vector<int64_t> sizes_of(const std::vector<Tensor>& list) {
  std::vector<int64_t> sizes;
  for (const Tensor& tensor : list) sizes.push_back(tensor.numel());
  return sizes;
}

// Calls f with a null pointer of the storage type that `storage` names beside buffers of type T.
template <class T, class F>
void with_storage(ScalarType storage, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(static_cast<double*>(nullptr));
  } else if (storage == ScalarType::BFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (storage == ScalarType::Half) {
    f(static_cast<Half*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class F>
void with_buffer_and_storage(ScalarType buffer, ScalarType storage, F&& f) {
  if (buffer == ScalarType::Double) {
    with_storage<double>(storage, [&](auto* s) { f(static_cast<double*>(nullptr), s); });
  } else {
    with_storage<float>(storage, [&](auto* s) { f(static_cast<float*>(nullptr), s); });
  }
}

}  // namespace lyapcuda::cpu
