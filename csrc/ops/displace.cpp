// torch.ops.lyapcuda.displace_: θ + step·v, and what of it the parameters' dtype realised.
#ifdef LYAPCUDA_ELEMENT

// The lists are copies and θ.
template <class T_, class P_>
struct Displace {
  using T = T_;
  using P = P_;
  using Arguments = DisplaceArguments<T>;
  static constexpr int kLists = 2;

  Arguments a;
  T step;

  LYAPCUDA_INLINE explicit Displace(const Arguments& arguments)
      : a(arguments), step(static_cast<T>(*a.step)) {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum* sums) const {
    using V = typename M::Value;
    const V v = m.read(a.v), here = m.read(Listed<1>{});
    const V there = here + v * step;
    accumulate(sums[0], v, round_to<P>(there) - here);
    accumulate(sums[1], v, v);
    m.write(Listed<0>{}, there);
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(a.v) && is(Listed<0>{}) && is(Listed<1>{});
  }
};

#else

#include "op.h"

namespace lyapcuda {

template <class T>
struct DisplaceArguments : ElementwiseArguments {
  static constexpr int kSums = 2;  // Σ v·(copies − θ), Σ v²
  static constexpr int kBlocks = 5;

  const T* v;
  const double* step;

  LYAPCUDA_HOST_DEVICE void finish(const double* sums, double* out) const {
    out[0] = sums[0];
    out[1] = sums[1];
  }
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/displace.cpp"
#include "arithmetic.h"

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

Tensor displace_(std::vector<Tensor> copies, Tensor v, std::vector<Tensor> theta,
                 std::vector<int64_t> offsets, Tensor step) {
  const Device device = device_of(v, "v");
  check_buffer(v, "v", device);
  check_segments(theta, "theta", offsets, v, device);
  check_segments(copies, "copies", offsets, v, device);
  check_like(copies, "copies", theta, "theta");
  check_vector(step, "step", 1, device);

  const Launcher launcher(device, step);
  const Tensor sums = new_doubles(step, {DisplaceArguments<float>::kSums});
  const ScalarType storage = theta.empty() ? v.scalar_type() : theta[0].scalar_type();
  with_buffer_and_storage(v.scalar_type(), storage, [&](auto* buffer, auto* stored) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    using P = std::remove_pointer_t<decltype(stored)>;
    const DisplaceArguments<T> arguments{{}, read<T>(v), read<double>(step)};
    LYAPCUDA_ELEMENTWISE(launcher, "displace_",
                         lists_of<P>(theta, offsets, written<P>(copies), read<P>(theta)), arguments,
                         written<double>(sums), Displace<T, P>);
  });
  return sums;
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(displace_,
            "(Tensor(a!)[] copies, Tensor v, Tensor[] theta, int[] offsets, Tensor step) -> Tensor")

#endif
