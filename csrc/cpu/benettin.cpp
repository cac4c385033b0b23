// torch.ops.lyapcuda.benettin_ and benettin_refine_: from the Gram matrix of a pass to the Ritz
// values, the exponents, and the transform to the next separations.
#include "../benettin.h"

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace lyapcuda::cpu {
namespace {

void check_panel_count(int64_t k) {
  STD_TORCH_CHECK(k >= 1 && k <= kMaxPanel, "k: expected 1 to ", kMaxPanel, ", got ", k);
}

void benettin_(Tensor state, Tensor gram, Tensor losses, int64_t k, int64_t sign, int64_t estimate,
               double momentum, bool realised, bool control, bool alternate, bool rotate,
               double ema) {
  check_panel_count(k);
  check_vector(state, "state", panel_size(k));
  check_step_options(sign, estimate, momentum, ema);
  const int64_t stacked = (2 + realised + (momentum > 0.0)) * k;
  check_matrix(gram, "gram", stacked, stacked);
  check_vector(losses, "losses");
  const BenettinOptions options{{static_cast<double>(sign), static_cast<Estimate>(estimate),
                                 momentum, control, alternate, ema},
                                realised,
                                rotate};
  std::vector<double> scratch(benettin_scratch(static_cast<int>(k)));
  benettin_step(SoloTeam{}, static_cast<double*>(state.mutable_data_ptr()),
                static_cast<const double*>(gram.const_data_ptr()),
                static_cast<const double*>(losses.const_data_ptr()),
                static_cast<int>(losses.numel()), static_cast<int>(k), options, scratch.data());
}

void benettin_refine_(Tensor state, Tensor gram, int64_t k) {
  check_panel_count(k);
  check_vector(state, "state", panel_size(k));
  check_matrix(gram, "gram", k, k);
  std::vector<double> scratch(benettin_scratch(static_cast<int>(k)));
  benettin_refine(SoloTeam{}, static_cast<double*>(state.mutable_data_ptr()),
                  static_cast<const double*>(gram.const_data_ptr()), static_cast<int>(k),
                  scratch.data());
}

}  // namespace
}  // namespace lyapcuda::cpu

STABLE_TORCH_LIBRARY_IMPL(lyapcuda, CPU, m) {
  m.impl("benettin_", TORCH_BOX(&lyapcuda::cpu::benettin_));
  m.impl("benettin_refine_", TORCH_BOX(&lyapcuda::cpu::benettin_refine_));
}
