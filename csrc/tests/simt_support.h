// What the tests of the kernels share: storage types, inputs, tensors beside flat buffers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>
#include <random>
#include <vector>

#include "../kernels/half.cuh"
#include "../simt/simt.h"
#include "../state.h"
#include "check.h"
#include "walled.h"

namespace lyapcuda::test {

constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse,
                                   simt::Order::kReverseLate};

// torch's own type for each of the kernels' storage types: an independent conversion.
template <class P>
struct TorchOf {
  using type = P;
};
template <>
struct TorchOf<kernels::BFloat16> {
  using type = torch::headeronly::BFloat16;
};
template <>
struct TorchOf<kernels::Half> {
  using type = torch::headeronly::Half;
};

// The arithmetic the kernels are held to: plain T, each operation rounded once.
template <class T, class P>
T value_of(const P& stored) {
  typename TorchOf<P>::type as_torch;
  std::memcpy(static_cast<void*>(&as_torch), &stored, sizeof(P));
  return static_cast<T>(as_torch);
}
template <class P, class T>
P stored_as(T value) {
  const typename TorchOf<P>::type as_torch(value);
  P out;
  std::memcpy(static_cast<void*>(&out), &as_torch, sizeof(P));
  return out;
}

// -1 to 1, with all the digits a double has.
inline double random_number() {
  static std::mt19937_64 generator(20);
  return std::uniform_real_distribution<double>(-1.0, 1.0)(generator);
}

template <class P>
void randomise(Walled<P>& array) {
  for (int64_t i = 0; i < array.size(); ++i) {
    if constexpr (sizeof(P) == sizeof(double)) {
      array[i] = random_number();
    } else {
      array[i] = stored_as<P>(static_cast<float>(random_number()));
    }
  }
}

template <class P>
bool same_bits(const Walled<P>& a, const Walled<P>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(P)) == 0;
}

// Sizes of tensors and where their segments lie in a flat buffer with a gap between any two. With a
// shift, neither tensors nor segments are aligned to 16 bytes.
struct Layout {
  std::vector<int64_t> sizes, offsets;
  int64_t shift, total;

  Layout(std::vector<int64_t> of, int64_t shifted) : sizes(std::move(of)), shift(shifted) {
    total = shift;
    for (const int64_t size : sizes) {
      offsets.push_back(total);
      total += size + 3;
      if (shift == 0) total = (total + 7) / 8 * 8;
    }
  }
  int64_t count() const { return static_cast<int64_t>(sizes.size()); }

  template <class T>
  bool gaps_untouched(const Walled<T>& flat) const {
    int64_t end = 0;
    for (int64_t s = 0; s < count(); ++s) {
      if (!flat.untouched(end, offsets[s])) return false;
      end = offsets[s] + sizes[s];
    }
    return flat.untouched(end, total);
  }
};

// A tensor per segment.
template <class P>
struct Tensors {
  std::vector<std::unique_ptr<Walled<P>>> arrays;
  std::vector<P*> pointers;

  Tensors(const Layout& layout, bool random) {
    // Not all alike: where the first is shifted, the second is not.
    for (int64_t s = 0; s < layout.count(); ++s) {
      const int64_t shift = s % 2 == 0 ? layout.shift : 0;
      arrays.push_back(std::make_unique<Walled<P>>(layout.sizes[s], shift, s % 2 * 64));
      if (random) randomise(*arrays.back());
      pointers.push_back(arrays.back()->data());
    }
  }
  P* const* list() { return pointers.data(); }
  // nvcc and g++ alike take one table of const pointers.
  const P* const* const_list() { return const_cast<const P* const*>(pointers.data()); }
  const Walled<P>& operator[](int64_t s) const { return *arrays[s]; }
  bool whole() const {
    for (const auto& array : arrays) {
      if (!array->whole()) return false;
    }
    return true;
  }
};

inline std::vector<double> some_state() {
  std::vector<double> state(kStateSize, std::nan(""));
  state[k_perturbation] = 0.1;
  state[k_scale] = -0.37;
  state[k_beta] = 0.81;
  state[k_guard] = state[k_steps] = state[k_skipped] = 0.0;
  state[k_reseed] = state[k_reseeds] = 0.0;
  state[k_committed] = state[k_accepted] = 1.0;
  return state;
}

// Every size alone, and all of them side by side, with more behind them so that the second of each
// pair of tensors, which is aligned, meets segments of every alignment.
inline std::vector<std::vector<int64_t>> size_lists() {
  std::vector<std::vector<int64_t>> lists = {
      {0, 1, 31, 33, 255, 257, 4097, 5, 40, 41, 40, 41, 40, 41, 40, 41}};
  for (const int64_t n : {0, 1, 31, 33, 255, 257, 4097}) lists.push_back({n});
  return lists;
}

}  // namespace lyapcuda::test
