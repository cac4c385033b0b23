// Argument checks shared by the ops of every backend. Each error names the argument and what it
// was; `device` is where the op runs, and all its tensors have to be.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "../scalars/state.h"

namespace lyapcuda {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::DeviceType;
using torch::stable::Tensor;

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

inline std::string device_name(const Device& device) {
  if (device.type() == DeviceType::CPU) return "cpu";
  if (device.type() == DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
  if (device.type() == DeviceType::Meta) return "meta";
  return "device type " + std::to_string(static_cast<int>(device.type()));
}

inline bool is_on(const Tensor& tensor, const Device& device) {
  return device.type() == DeviceType::CPU ? tensor.is_cpu() : tensor.device() == device;
}

// As in "expected a contiguous tensor on cuda:0".
inline std::string tensor_on(const Device& device) {
  return device.type() == DeviceType::CPU ? "CPU tensor" : "tensor on " + device_name(device);
}

inline void check_device(const Tensor& tensor, const char* name, const Device& device) {
  STD_TORCH_CHECK(is_on(tensor, device), name, ": expected a ", tensor_on(device), ", got one on ",
                  device_name(tensor.device()));
}

inline void check_buffer(const Tensor& tensor, const char* name, const Device& device) {
  STD_TORCH_CHECK(is_buffer_dtype(tensor.scalar_type()), name,
                  ": expected float32 or float64, got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name,
                  ": expected a contiguous 1-D tensor, got ", tensor.dim(), " dimensions");
  check_device(tensor, name, device);
}

inline void check_same_buffer(const Tensor& tensor, const char* name, const Tensor& like,
                              const char* like_name, const Device& device) {
  check_buffer(tensor, name, device);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": dtype ",
                  dtype_name(tensor.scalar_type()), " differs from ", like_name, "'s ",
                  dtype_name(like.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == like.numel(), name, ": ", tensor.numel(), " elements, but ",
                  like_name, " has ", like.numel());
}

inline void check_both(const std::optional<Tensor>& a, const char* a_name,
                       const std::optional<Tensor>& b, const char* b_name) {
  STD_TORCH_CHECK(a.has_value() == b.has_value(), a_name, ", ", b_name, ": give both or neither");
}

// k vectors, one a row.
inline void check_panel(const Tensor& tensor, const char* name, int64_t most,
                        const Device& device) {
  STD_TORCH_CHECK(is_buffer_dtype(tensor.scalar_type()), name,
                  ": expected float32 or float64, got ", dtype_name(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name,
                  ": expected a contiguous 2-D tensor, got ", tensor.dim(), " dimensions");
  check_device(tensor, name, device);
  STD_TORCH_CHECK(tensor.size(0) >= 1 && tensor.size(0) <= most, name, ": ", tensor.size(0),
                  " rows, expected 1 to ", most);
}

inline void check_row_length(const Tensor& tensor, const char* name, const Tensor& like,
                             const char* like_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": dtype ",
                  dtype_name(tensor.scalar_type()), " differs from ", like_name, "'s ",
                  dtype_name(like.scalar_type()));
  STD_TORCH_CHECK(tensor.size(tensor.dim() - 1) == like.size(like.dim() - 1), name, ": rows of ",
                  tensor.size(tensor.dim() - 1), " elements, but ", like_name, " has rows of ",
                  like.size(like.dim() - 1));
}

inline void check_same_panel(const Tensor& tensor, const char* name, const Tensor& like,
                             const char* like_name, const Device& device) {
  check_panel(tensor, name, kMaxRows, device);
  STD_TORCH_CHECK(tensor.size(0) == like.size(0), name, ": ", tensor.size(0), " rows, but ",
                  like_name, " has ", like.size(0));
  check_row_length(tensor, name, like, like_name);
}

// The panel of what is stored beside `like`: the same shape, in the storage type.
inline void check_storage_panel(const Tensor& tensor, const char* name, const Tensor& like,
                                const char* like_name, const std::vector<Tensor>& list,
                                const char* list_name, const Device& device) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(is_storage_dtype(dtype, like.scalar_type()), name, ": dtype ", dtype_name(dtype),
                  " can't go with a ", dtype_name(like.scalar_type()), " buffer");
  STD_TORCH_CHECK(list.empty() || dtype == list[0].scalar_type(), name, ": dtype ",
                  dtype_name(dtype), " differs from ", list_name, "'s ",
                  list.empty() ? "" : dtype_name(list[0].scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name,
                  ": expected a contiguous 2-D tensor, got ", tensor.dim(), " dimensions");
  check_device(tensor, name, device);
  STD_TORCH_CHECK(tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1), name, ": ",
                  tensor.size(0), " rows of ", tensor.size(1), ", but ", like_name, " has ",
                  like.size(0), " of ", like.size(1));
}

inline void check_vector(const Tensor& tensor, const char* name, const Device& device) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous(), name,
                  ": expected a contiguous float64 ", tensor_on(device), ", got ",
                  dtype_name(tensor.scalar_type()));
  check_device(tensor, name, device);
}

inline void check_vector(const Tensor& tensor, const char* name, int64_t size,
                         const Device& device) {
  check_vector(tensor, name, device);
  STD_TORCH_CHECK(tensor.numel() == size, name, ": expected ", size, " elements, got ",
                  tensor.numel());
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                         const Device& device) {
  check_vector(tensor, name, device);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name,
                  ": expected ", rows, " x ", columns, " elements, got ", tensor.numel(), " in ",
                  tensor.dim(), " dimensions");
}

inline void check_sign(int64_t sign) {
  STD_TORCH_CHECK(sign == 1 || sign == -1, "sign: expected 1 (ascent) or -1 (descent), got ", sign);
}

// A list of tensors that lie at `offsets` of a flat buffer, or of every row of a panel. (Each
// question to a tensor is a call through the stable ABI: none is asked twice.)
inline void check_segments(const std::vector<Tensor>& list, const char* name,
                           const std::vector<int64_t>& offsets, const Tensor& flat,
                           const Device& device) {
  const int64_t length = flat.size(flat.dim() - 1);
  STD_TORCH_CHECK(list.size() == offsets.size(), name, ": ", list.size(),
                  " tensors, but offsets has ", offsets.size(), " entries");
  if (list.empty()) return;
  const ScalarType first = list[0].scalar_type(), buffer = flat.scalar_type();
  int64_t end = 0;  // of the segment before
  for (size_t i = 0; i < list.size(); ++i) {
    const ScalarType dtype = i == 0 ? first : list[i].scalar_type();
    STD_TORCH_CHECK(is_on(list[i], device) && list[i].is_contiguous(), name, "[", i,
                    "]: expected a contiguous ", tensor_on(device));
    STD_TORCH_CHECK(is_storage_dtype(dtype, buffer), name, "[", i, "]: dtype ", dtype_name(dtype),
                    " can't go with a ", dtype_name(buffer), " buffer");
    STD_TORCH_CHECK(dtype == first, name, "[", i, "]: dtype ", dtype_name(dtype), " differs from ",
                    name, "[0]'s ", dtype_name(first));
    const int64_t numel = list[i].numel();
    // In order and apart: two threads would write what two segments share.
    STD_TORCH_CHECK(i == 0 || offsets[i] >= end, "offsets[", i, "]: ", offsets[i],
                    " lies inside or before the segment of ", name, "[", i - 1, "]");
    STD_TORCH_CHECK(offsets[i] >= 0 && numel <= length && offsets[i] <= length - numel, "offsets[",
                    i, "]: ", offsets[i], " + ", numel, " elements of ", name,
                    " don't fit a buffer of ", length);
    end = offsets[i] + numel;
  }
}

// Of two lists of which each is of one dtype, as check_segments sees to.
inline void check_like(const std::vector<Tensor>& list, const char* name,
                       const std::vector<Tensor>& like, const char* like_name) {
  STD_TORCH_CHECK(list.size() == like.size(), name, ": ", list.size(), " tensors, but ", like_name,
                  " has ", like.size());
  if (list.empty()) return;
  const ScalarType dtype = list[0].scalar_type(), wanted = like[0].scalar_type();
  STD_TORCH_CHECK(dtype == wanted, name, "[0]: dtype ", dtype_name(dtype), " differs from ",
                  like_name, "'s ", dtype_name(wanted));
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(list[i].numel() == like[i].numel(), name, "[", i, "]: ", list[i].numel(),
                    " elements, but ", like_name, "[", i, "] has ", like[i].numel());
  }
}

// Whether two tensors share a byte.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto end = [](const Tensor& t) {
    return static_cast<const char*>(t.const_data_ptr()) +
           t.numel() * static_cast<int64_t>(t.element_size());
  };
  return static_cast<const char*>(a.const_data_ptr()) < end(b) &&
         static_cast<const char*>(b.const_data_ptr()) < end(a);
}

// Whether two panels are one: a product of them is symmetric.
inline bool is_itself(const Tensor& a, const Tensor& b) {
  return a.const_data_ptr() == b.const_data_ptr() && a.size(0) == b.size(0);
}

// What is written while another tensor is still read, some elements at a time, lies apart from it
// or is the same elements.
inline void check_over(const Tensor& written, const char* name, const Tensor& read,
                       const char* read_name) {
  const bool same = written.const_data_ptr() == read.const_data_ptr() &&
                    written.scalar_type() == read.scalar_type();
  STD_TORCH_CHECK(same || !overlap(written, read), name, ": shares memory with ", read_name,
                  ", but is not the same elements (it starts elsewhere, or has another dtype)");
}

// A flat buffer beside the rows of a panel, which all of them share.
inline void check_shared_row(const Tensor& tensor, const char* name, const Tensor& like,
                             const char* like_name, const Device& device) {
  check_buffer(tensor, name, device);
  check_row_length(tensor, name, like, like_name);
}

// The S of a diagonal metric, and p, the momentum that may be given in its place.
inline void check_metric(const std::optional<Tensor>& metric, const std::optional<Tensor>& p,
                         const Tensor& q, const Device& device) {
  if (!metric) return;
  STD_TORCH_CHECK(!p, "metric: momentum isn't offered with it: leave out p and p_next, or metric");
  check_shared_row(*metric, "metric", q, "q", device);
}

// A gate on the device: where it is 0 there is nothing to do.
inline void check_gate(const std::optional<Tensor>& gate, const Device& device) {
  if (gate) check_vector(*gate, "gate", 1, device);
}

inline std::vector<int64_t> sizes_of(const std::vector<Tensor>& list) {
  std::vector<int64_t> sizes;
  for (const Tensor& tensor : list) sizes.push_back(tensor.numel());
  return sizes;
}

// Calls f with null pointers of the buffers' type and of the storage type beside it; BFloat16 and
// Half are a backend's own. LYAPCUDA_FEW_TYPES leaves two pairs of the four: builds with sanitizers
// take half as long.
template <class BFloat16, class Half, class F>
void with_types(ScalarType buffer, ScalarType storage, F&& f) {
#ifdef LYAPCUDA_FEW_TYPES
  STD_TORCH_CHECK(buffer == ScalarType::Float && storage != ScalarType::Half,
                  "built without float64 and float16");
#else
  if (buffer == ScalarType::Double) {
    return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
  }
  if (storage == ScalarType::Half) {
    return f(static_cast<float*>(nullptr), static_cast<Half*>(nullptr));
  }
#endif
  if (storage == ScalarType::BFloat16) {
    f(static_cast<float*>(nullptr), static_cast<BFloat16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  }
}

}  // namespace lyapcuda
