// torch.ops.lyapcuda.benettin_ and benettin_refine_: from the Gram matrix of a pass to the Ritz
// values, the exponents, and the transform to the next separations.
#include "op.h"

#include "../scalars/benettin.h"

#ifdef LYAPCUDA_ON_CUDA
#include "../cuda/benettin.h"
#else
#include "../cpu/benettin.h"
#endif

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

void check_k(int64_t k) {
  STD_TORCH_CHECK(k >= 1 && k <= kMaxK, "k: expected 1 to ", kMaxK, ", got ", k);
}

void benettin_(Tensor state, Tensor gram, Tensor losses, int64_t k, int64_t sign, int64_t estimate,
               double momentum, bool realised, bool control, bool alternate, bool rotate,
               double ema, std::optional<Tensor> displaced) {
  const Device device = device_of(state, "state");
  check_k(k);
  check_vector(state, "state", state_size(k), device);
  check_sign(sign);
  STD_TORCH_CHECK(estimate >= 0 && estimate <= 5, "estimate: expected 0 to 5, got ", estimate);
  STD_TORCH_CHECK(momentum >= 0.0 && momentum < 1.0, "momentum: expected [0, 1), got ", momentum);
  STD_TORCH_CHECK(ema >= 0.0 && ema < 1.0, "ema: expected [0, 1), got ", ema);
  const int64_t stacked = (2 + realised + (momentum > 0.0)) * k;
  check_matrix(gram, "gram", stacked, stacked, device);
  check_vector(losses, "losses", device);
  if (displaced) check_matrix(*displaced, "displaced", k, k, device);
  const BenettinOptions options{{static_cast<double>(sign), static_cast<Estimate>(estimate),
                                 momentum, control, alternate, ema},
                                realised,
                                rotate,
                                read<double>(displaced)};
  step(Launcher(device, state), written<double>(state), read<double>(gram), read<double>(losses),
       static_cast<int>(losses.numel()), static_cast<int>(k), options);
}

void benettin_refine_(Tensor state, Tensor gram, int64_t k) {
  const Device device = device_of(state, "state");
  check_k(k);
  check_vector(state, "state", state_size(k), device);
  check_matrix(gram, "gram", k, k, device);
  refine(Launcher(device, state), written<double>(state), read<double>(gram), static_cast<int>(k));
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(benettin_,
            "(Tensor(a!) state, Tensor gram, Tensor losses, int k, *, int sign=1, "
            "int estimate=0, float momentum=0., bool realised=False, bool control=True, "
            "bool alternate=True, bool rotate=True, float ema=0., Tensor? displaced=None) -> ()")
LYAPCUDA_OP(benettin_refine_, "(Tensor(a!) state, Tensor gram, int k) -> ()")
