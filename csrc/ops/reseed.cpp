// torch.ops.lyapcuda.reseed_: another separation where the state says that one was lost.
#ifdef LYAPCUDA_ELEMENT

// The row that is lost, where one is. The list tells where segments are, and isn't read.
template <class T_>
struct ReseedRow {
  using T = T_;
  using P = T_;
  using Arguments = ReseedArguments<T>;
  static constexpr int kLists = 1;

  T *row, *p;
  Reseed lost;

  LYAPCUDA_INLINE explicit ReseedRow(const Arguments& a) : row(a.panel), p(a.p), lost(a.lost()) {
    row += lost.row * a.n;
    if (p != nullptr) p += lost.row * a.n;
  }

  template <class M>
  LYAPCUDA_INLINE void operator()(const M& m, typename M::Sum*) const {
    for (int64_t at = m.place(); at < m.place() + m.count(); ++at) {
      row[at] = static_cast<T>(lost.element(at) * lost.size);
      if (p != nullptr) p[at] = T{0};
    }
  }

  // A rare event: a number at a time will do.
  template <class A>
  LYAPCUDA_INLINE bool aligned(const A&) const {
    return false;
  }
};

#else

#include "op.h"

#include "../scalars/reseed.h"

namespace lyapcuda {

template <class T>
struct ReseedArguments : ElementwiseArguments {
  T *panel, *p;  // (k, n) each; p may be null
  int64_t n, k;
  const double* state;
  int64_t elements, seed;

  LYAPCUDA_HOST_DEVICE Reseed lost() const { return reseed_of(state, k, elements, seed); }
  LYAPCUDA_HOST_DEVICE bool go() const { return lost().row >= 0; }
};

}  // namespace lyapcuda

#define LYAPCUDA_SOURCE "../ops/reseed.cpp"
#include "arithmetic.h"

namespace lyapcuda::LYAPCUDA_BACKEND {
namespace {

void reseed_(Tensor panel, std::vector<int64_t> offsets, std::vector<int64_t> sizes, Tensor state,
             int64_t elements, int64_t seed, std::optional<Tensor> p) {
  const Device device = device_of(panel, "panel");
  check_panel(panel, "panel", kMaxK, device);
  if (p) check_same_panel(*p, "p", panel, "panel", device);
  const int64_t k = panel.size(0), length = panel.size(1);
  check_vector(state, "state", state_size(k), device);
  STD_TORCH_CHECK(!p || !overlap(*p, panel), "p: shares memory with panel");
  STD_TORCH_CHECK(elements >= 1, "elements: expected at least 1, got ", elements);
  STD_TORCH_CHECK(sizes.size() == offsets.size(), "sizes: ", sizes.size(),
                  " entries, but offsets has ", offsets.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    STD_TORCH_CHECK(sizes[i] >= 0 && offsets[i] >= 0 && sizes[i] <= length &&
                        offsets[i] <= length - sizes[i] &&
                        (i == 0 || offsets[i] >= offsets[i - 1] + sizes[i - 1]),
                    "offsets[", i, "]: ", offsets[i], " + ", sizes[i],
                    " elements don't fit a buffer of ", length, ", or lie in the segment before");
  }
  if (sizes.empty()) return;

  const Launcher launcher(device, state);
  with_buffer_and_storage(panel.scalar_type(), panel.scalar_type(), [&](auto* buffer, auto*) {
    using T = std::remove_pointer_t<decltype(buffer)>;
    const ReseedArguments<T> arguments{{}, written<T>(panel),   written<T>(p), length,
                                       k,  read<double>(state), elements,      seed};
    const Lists<T, 1> lists{sizes, offsets, {std::vector<T*>(sizes.size(), arguments.panel)}};
    LYAPCUDA_ELEMENTWISE(launcher, "reseed_", lists, arguments, nullptr, ReseedRow<T>);
  });
}

}  // namespace
}  // namespace lyapcuda::LYAPCUDA_BACKEND

LYAPCUDA_OP(reseed_,
            "(Tensor(a!) panel, int[] offsets, int[] sizes, Tensor state, *, int elements, "
            "int seed=0, Tensor(b!)? p=None) -> ()")

#endif
