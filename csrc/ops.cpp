// Schemas of torch.ops.lyapcuda. Every backend registers the same names; the fakes are in
// lyapcuda/ops/fakes.py, the fp64 oracles in lyapcuda/ops/reference.py and panel_reference.py.
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
      "int[] offsets, Tensor state, *, Tensor(c!)? p=None, Tensor? p_previous=None) -> ()");
  m.def(
      "descend_(Tensor(a!)[] theta, Tensor[] gradient, Tensor state, *, float gain=1., "
      "float max_lr=10., float weight_decay=0., float momentum=0., bool nesterov=False, "
      "Tensor(b!)? buffer=None, int[]? offsets=None, Tensor? factor=None) -> Tensor");
  m.def(
      "displace_(Tensor(a!)[] copies, Tensor v, Tensor[] theta, int[] offsets, Tensor step) "
      "-> Tensor");
  m.def(
      "difference_(Tensor(a!) out, Tensor[] plus, Tensor[] minus, int[] offsets, Tensor scale, *, "
      "float keep=0., float weight_decay=0., Tensor? v=None) -> ()");
  m.def(
      "panel_ascent_(Tensor(a!) d, Tensor q, Tensor[] g0, Tensor g1, int[] offsets, Tensor state, "
      "*, int sign=1, float weight_decay=0., Tensor[]? theta=None, float momentum=0., "
      "Tensor? p=None, Tensor(b!)? p_next=None) -> Tensor");
  m.def(
      "benettin_(Tensor(a!) state, Tensor gram, Tensor losses, int k, *, int sign=1, "
      "int estimate=0, float momentum=0., bool realised=False, bool control=True, "
      "bool alternate=True, bool rotate=True, float ema=0.) -> ()");
  m.def("benettin_refine_(Tensor(a!) state, Tensor gram, int k) -> ()");
  m.def(
      "panel_recenter_(Tensor(a!) q, Tensor(b!) copies, Tensor d, Tensor[] theta, int[] offsets, "
      "Tensor state) -> ()");
  m.def(
      "panel_slopes_(Tensor[] theta, Tensor[] gradient, int[] offsets, Tensor panel, Tensor state, "
      "*, float weight_decay=0., float momentum=0., bool nesterov=False, Tensor(a!)? buffer=None, "
      "Tensor? factor=None) -> Tensor");
  m.def(
      "panel_descend_(Tensor(a!)[] theta, Tensor[] gradient, int[] offsets, Tensor panel, "
      "Tensor state, Tensor slopes, *, float gain=1., float max_lr=10., float weight_decay=0., "
      "float momentum=0., bool nesterov=False, Tensor? buffer=None, Tensor? factor=None) -> "
      "Tensor");
  m.def("gram(Tensor a, Tensor b, *, Tensor? gate=None) -> Tensor");
  m.def("combine_(Tensor(a!) out, Tensor panel, Tensor matrix, *, Tensor? gate=None) -> ()");
  m.def("project_(Tensor(a!) w, Tensor v, Tensor coefficients) -> Tensor");
  m.def(
      "reseed_(Tensor(a!) panel, int[] offsets, int[] sizes, Tensor state, *, int elements, "
      "int seed=0, Tensor(b!)? p=None) -> ()");
  m.def("stream_copy_(Tensor(a!) destination, Tensor source) -> ()");
}
