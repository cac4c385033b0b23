// torch.ops.lyapcuda.directional_products: slope and curvature of a loss along a direction, from
// the gradients at two ends of it.
#ifdef LYAPCUDA_ELEMENT

// The lists are the gradients g0 and g1.
template <class T_, class P_>
struct Directional {
  using T = T_;
  using P = P_;
  using Arguments = DirectionalArguments<T>;
  static constexpr int kLists = 2;

  Arguments a;

  LYAPCUDA_INLINE explicit Directional(const Arguments& arguments) : a(arguments) {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum* sums) const {
    using V = typename M::Value;
    const V u = m.read(a.u), g0 = m.read(Listed<0>{});
    accumulate(sums[0], u, g0);
    accumulate(sums[1], u, m.read(Listed<1>{}) - g0);
    accumulate(sums[2], u, u);
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(a.u) && is(Listed<0>{}) && is(Listed<1>{});
  }
};

#else

#include "op.h"

namespace lyapcuda {

template <class T>
struct DirectionalArguments : ElementwiseArguments {
  static constexpr int kSums = 3;  // Σ u·g0, Σ u·(g1 − g0), Σ u²
  static constexpr int kBlocks = 5;

  const T* u;

  LYAPCUDA_HOST_DEVICE void finish(const double* sums, double* out) const {
    for (int i = 0; i < kSums; ++i) out[i] = sums[i];
  }
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/directional.cpp"
#include "arithmetic.h"

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor directional_products(Tensor u, std::vector<Tensor> g0, std::vector<Tensor> g1,
                            std::vector<int64_t> offsets) {
  const Device device = device_of(u, "u");
  check_buffer(u, "u", device);
  check_segments(g0, "g0", offsets, u, device);
  check_segments(g1, "g1", offsets, u, device);
  check_like(g1, "g1", g0, "g0");

  const Launcher launcher(device, u);
  const Tensor sums = new_doubles(u, {DirectionalArguments<float>::kSums});
  const ScalarType storage = g0.empty() ? u.scalar_type() : g0[0].scalar_type();
  with_buffer_and_storage(u.scalar_type(), storage, [&](auto* buffer, auto* stored) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(stored)>;
    const DirectionalArguments<T> arguments{{}, read<T>(u)};
    LYAPCUDA_ELEMENTWISE(launcher, "directional_products",
                         lists_of<P>(g0, offsets, read<P>(g0), read<P>(g1)), arguments,
                         written<double>(sums), Directional<T, P>);
  });
  return sums;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(directional_products, "(Tensor u, Tensor[] g0, Tensor[] g1, int[] offsets) -> Tensor")

#endif
