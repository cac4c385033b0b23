// Schemas of torch.ops.lyapcuda. Every backend registers the same names; the fakes are in
// lyapcuda/ops.py, the fp64 oracles in lyapcuda/reference.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lyapcuda, m) {
  m.def(
      "ascent_(Tensor(a!) d, Tensor q, Tensor[] g0, Tensor[] g1, int[] offsets, Tensor state, *, "
      "int sign=1, float weight_decay=0., Tensor[]? theta=None, "
      "float momentum=0., Tensor? p=None, Tensor(b!)? p_next=None) -> Tensor");
  m.def(
      "exponent_(Tensor(a!) state, Tensor sums, Tensor losses, *, int sign=1, int estimate=0, "
      "float momentum=0., bool control=True, bool alternate=True, float ema=0.) -> ()");
  m.def("secant_(Tensor(a!) state, Tensor sums, *, int sign=1) -> ()");
  m.def(
      "recenter_(Tensor(a!)[] theta1, Tensor(b!) q, Tensor q_previous, Tensor[] theta, "
      "int[] offsets, Tensor state) -> ()");
  m.def(
      "descend_(Tensor(a!)[] theta, Tensor[] gradient, Tensor state, *, float gain=1., "
      "float max_lr=10., float weight_decay=0.) -> Tensor");
  m.def("stream_copy_(Tensor(a!) destination, Tensor source) -> ()");
}
