// torch.ops.lyapcuda.difference_: a difference of gradients as a product of the Hessian.
#ifdef LYAPCUDA_ELEMENT

// out = scale·(plus − minus) + weight_decay·v. The lists are plus and minus.
template <class T_, class P_, bool kDecay>
struct Difference {
  using T = T_;
  using P = P_;
  using Arguments = DifferenceArguments<T>;
  static constexpr int kLists = 2;

  Arguments a;
  T scale, weight_decay;

  LYAPCUDA_INLINE explicit Difference(const Arguments& arguments)
      : a(arguments),
        scale(static_cast<T>(*a.scale)),
        weight_decay(static_cast<T>(a.weight_decay)) {}

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum*) const {
    auto out = (m.read(Listed<0>{}) - m.read(Listed<1>{})) * scale;
    if constexpr (kDecay) out = out + m.read(a.v) * weight_decay;
    m.write(a.out, out);
  }

  template <class A>
  LYAPCUDA_INLINE bool aligned(const A& is) const {
    return is(a.out) && is(Listed<0>{}) && is(Listed<1>{}) && (!kDecay || is(a.v));
  }
};

#else

#include "op.h"

namespace lyapcuda {

template <class T>
struct DifferenceArguments : ElementwiseArguments {
  T* out;  // may lie where plus or minus does, element by element
  const T* v;
  const double* scale;
  double weight_decay;
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/difference.cpp"
#include "arithmetic.h"

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

void difference_(Tensor out, std::vector<Tensor> plus, std::vector<Tensor> minus,
                 std::vector<int64_t> offsets, Tensor scale, double weight_decay,
                 std::optional<Tensor> v) {
  const Device device = device_of(out, "out");
  check_buffer(out, "out", device);
  check_segments(plus, "plus", offsets, out, device);
  check_segments(minus, "minus", offsets, out, device);
  check_like(minus, "minus", plus, "plus");
  check_vector(scale, "scale", 1, device);
  if (v) check_same_buffer(*v, "v", out, "out", device);
  STD_TORCH_CHECK(v.has_value() || weight_decay == 0.0, "weight_decay: ", weight_decay, " needs v");
  if (plus.empty()) return;

  const Launcher launcher(device, scale);
  with_buffer_and_storage(
      out.scalar_type(), plus[0].scalar_type(), [&](auto* buffer, auto* stored) {
        using T = std::remove_pointer_t<decltype(buffer)>;
        using P = std::remove_pointer_t<decltype(stored)>;
        const DifferenceArguments<T> arguments{
            {}, written<T>(out), read<T>(v), read<double>(scale), weight_decay};
        const auto lists = lists_of<P>(plus, offsets, read<P>(plus), read<P>(minus));
        with_flags(weight_decay != 0.0, [&](auto decays) {
          LYAPCUDA_ELEMENTWISE(launcher, "difference_", lists, arguments, nullptr,
                               Difference<T, P, decltype(decays)::value>);
        });
      });
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(difference_,
            "(Tensor(a!) out, Tensor[] plus, Tensor[] minus, int[] offsets, Tensor scale, *, "
            "float weight_decay=0., Tensor? v=None) -> ()")

#endif
