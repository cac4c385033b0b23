// Lists of tensors beside flat buffers: what an elementwise op works on.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace lyapcuda {

// A stream of an elementwise op: the i-th list. Its other streams are pointers to flat buffers.
template <int i>
struct Listed {};

// The data of kLists lists of tensors of one dtype, and where their segments lie in flat buffers.
template <class P, int kLists>
struct Lists {
  std::vector<int64_t> sizes, offsets;
  std::array<std::vector<P*>, kLists> data;

  int64_t count() const { return static_cast<int64_t>(sizes.size()); }
};

// Lists are asked for their data before threads start: a copy-on-write tensor copies itself then.
template <class P>
std::vector<P*> written(const std::vector<Tensor>& list) {
  std::vector<P*> pointers;
  for (const Tensor& tensor : list) pointers.push_back(static_cast<P*>(tensor.mutable_data_ptr()));
  return pointers;
}
// Not const: one table has lists to write beside lists that are only read.
template <class P>
std::vector<P*> read(const std::vector<Tensor>& list) {
  std::vector<P*> pointers;
  for (const Tensor& tensor : list) {
    pointers.push_back(const_cast<P*>(static_cast<const P*>(tensor.const_data_ptr())));
  }
  return pointers;
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}
template <class T>
T* written(const std::optional<Tensor>& tensor) {
  return tensor ? written<T>(*tensor) : nullptr;
}

// New numbers beside a tensor, in float64.
inline Tensor new_doubles(const Tensor& beside, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(beside, sizes, ScalarType::Double);
}

template <class P, class... Data>
Lists<P, sizeof...(Data)> lists_of(const std::vector<Tensor>& like,
                                   const std::vector<int64_t>& offsets, Data... data) {
  return {sizes_of(like), offsets, {std::move(data)...}};
}

// What an elementwise op's arguments are, unless they say otherwise.
struct ElementwiseArguments {
  static constexpr int kSums = 0;    // sums in double over all elements
  static constexpr int kBlocks = 4;  // that a multiprocessor is to hold, as registers allow

  // Whether there is anything to do. Where not, sums are not asked for.
  LYAPCUDA_HOST_DEVICE bool go() const { return true; }
  // What is written once a call, whether or not there is anything to do.
  LYAPCUDA_HOST_DEVICE void note() const {}
  // The output, from an element of the flat buffers on, that may bypass the cache where it is
  // large: what the op doesn't read anyway. Of the CPU.
  const void* output(int64_t) const { return nullptr; }
};

}  // namespace lyapcuda
