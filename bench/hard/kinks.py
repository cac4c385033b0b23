"""Losses whose derivative jumps, by names that autograd's graph shows and by others.

The truth is the Hessian where θ is: that of the smooth piece of the loss, double backward's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import Act
from hard.problem import Asks, Family, Problem, clusters, many, mlp, pictures, supervised

_CLIMBS: Asks = (("LA", 1), ("BE", 3))

# --- activations, and the same by comparisons ----------------------------------------------------


def _between(z: Tensor, low: float, high: float) -> Tensor:
    """z clipped, by comparisons."""
    inside = ((z > low) & (z < high)).to(z.dtype)
    return z * inside + low * (z <= low).to(z.dtype) + high * (z >= high).to(z.dtype)


def _leaky(z: Tensor) -> Tensor:
    return z * (0.01 + 0.99 * (z > 0).to(z.dtype))


def _hard_sigmoid(z: Tensor) -> Tensor:
    return _between(z / 6 + 0.5, 0.0, 1.0)


def _soft_shrink(z: Tensor) -> Tensor:
    sign = (z > 0.2).to(z.dtype) - (z < -0.2).to(z.dtype)
    return z * sign.abs() - 0.2 * sign


def _picked(z: Tensor, index: Tensor) -> Tensor:
    """Entries of the last dimension."""
    return torch.gather(z, -1, index)


def _pairs(z: Tensor) -> Tensor:
    return z.unflatten(-1, (-1, 2))


def _plain_maxout(z: Tensor) -> Tensor:
    first, second = _pairs(z).unbind(-1)
    wins = (first.detach() > second.detach()).to(z.dtype)
    return first * wins + second * (1 - wins)


def _top(z: Tensor) -> Tensor:
    """The six largest features, the others zero."""
    values, index = z.topk(6, -1)
    return torch.zeros_like(z).scatter(-1, index, values)


def _plain_top(z: Tensor) -> Tensor:
    rank = z.detach().argsort(-1, descending=True).argsort(-1)
    return z * (rank < 6).to(z.dtype)


def _running_max(z: Tensor) -> Tensor:
    columns = [z[..., :1]]
    for i in range(1, z.shape[-1]):
        index = z[..., : i + 1].detach().argmax(-1, keepdim=True)
        columns.append(_picked(z, index))
    return torch.cat(columns, -1)


def _plain_median(z: Tensor) -> Tensor:
    middle = z.detach().argsort(-1)[..., (z.shape[-1] - 1) // 2 :][..., :1]
    return z - _picked(z, middle)


#: (function, the same plainly): Seen by name in the graph.
_SHOWN: dict[str, tuple[Callable, Callable]] = {
    "ReLU": (F.relu, lambda z: z * (z > 0).to(z.dtype)),
    "leaky ReLU": (F.leaky_relu, _leaky),
    "ReLU6": (F.relu6, lambda z: _between(z, 0.0, 6.0)),
    "hardtanh": (F.hardtanh, lambda z: _between(z, -1.0, 1.0)),
    "hardsigmoid": (F.hardsigmoid, _hard_sigmoid),
    "hardswish": (F.hardswish, lambda z: z * _hard_sigmoid(z)),
    "maximum": (lambda z: torch.maximum(z, torch.zeros_like(z)), F.relu),
    "abs": (torch.abs, lambda z: z * z.detach().sign()),
}
_HIDDEN: dict[str, tuple[Callable, Callable]] = {
    "where": (lambda z: torch.where(z > 0, z, torch.zeros_like(z)), F.relu),
    "clamp": (lambda z: z.clamp(min=0), F.relu),
    "mask": (lambda z: z * (z > 0), F.relu),
    "fmax": (lambda z: torch.fmax(z, torch.zeros_like(z)), F.relu),
    "softshrink": (lambda z: F.softshrink(z, 0.2), _soft_shrink),
    "hardshrink": (lambda z: F.hardshrink(z, 0.2), lambda z: z * (z.abs() > 0.2).to(z.dtype)),
    "topk": (_top, _plain_top),
    "sort": (
        lambda z: z.sort(-1).values,
        lambda z: _picked(z, z.detach().argsort(-1)),
    ),
    "median": (lambda z: z - z.median(-1, keepdim=True).values, _plain_median),
    "cummax": (lambda z: z.cummax(-1).values, _running_max),
}
#: They leave half of the features.
_HALVING: dict[str, Callable] = {
    "amax": lambda z: _pairs(z).amax(-1),
    "max(dim)": lambda z: _pairs(z).max(-1).values,
}


def _activation(name: str, act: Callable, plain: Callable, climbs: Asks = ()) -> Family:
    def make(seed: int, dtype: torch.dtype) -> Problem:
        narrower = 2 if name in _HALVING else 1
        return supervised(
            seed,
            dtype,
            lambda: mlp(lambda: Act(act), narrower=narrower),
            lambda: mlp(lambda: Act(plain), narrower=narrower),
            data=many,
        )

    kind = "kinks shown" if name in _SHOWN else "kinks hidden"
    return Family(name, kind, make, climbs=climbs)


# --- losses ---------------------------------------------------------------------------------------


def _margins(out: Tensor, y: Tensor) -> Tensor:
    """1 − (the right class's score − each other's), (samples, classes − 1)."""
    right = _picked(out, y[:, None])
    others = out[~F.one_hot(y, out.shape[1]).bool()].view(len(y), -1)
    return 1 - right + others


def _hinge(out: Tensor, y: Tensor) -> Tensor:
    return _margins(out, y).max(1).values.clamp(min=0).mean()


def _plain_hinge(out: Tensor, y: Tensor) -> Tensor:
    margins = _margins(out, y)
    worst = _picked(margins, margins.detach().argmax(1, keepdim=True))
    return (worst * (worst > 0).to(out.dtype)).mean()


def _plain_multi_margin(out: Tensor, y: Tensor) -> Tensor:
    margins = _margins(out, y)
    return (margins * (margins > 0).to(out.dtype)).sum(1).mean() / out.shape[1]


def _distances(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, positives, negatives, of samples in the order of 4 classes in turn."""
    return out[:-4], out[4:], out[1:-3]


def _triplet(out: Tensor, y: Tensor) -> Tensor:
    return F.triplet_margin_loss(*_distances(out, y))


def _plain_triplet(out: Tensor, y: Tensor) -> Tensor:
    a, p, n = _distances(out, y)
    near, far = (((a - b + 1e-6) ** 2).sum(1).sqrt() for b in (p, n))
    margins = near - far + 1
    return (margins * (margins > 0).to(out.dtype)).mean()


def _one_hot(out: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, out.shape[1]).to(out.dtype)


def _l1(out: Tensor, y: Tensor) -> Tensor:
    return F.l1_loss(out, _one_hot(out, y))


def _plain_l1(out: Tensor, y: Tensor) -> Tensor:
    apart = out - _one_hot(out, y)
    return (apart * apart.detach().sign()).mean()


def _huber(out: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(out, _one_hot(out, y), beta=0.3)


def _plain_huber(out: Tensor, y: Tensor) -> Tensor:
    apart = out - _one_hot(out, y)
    inside = (apart.detach().abs() < 0.3).to(out.dtype)
    outside = (apart * apart.detach().sign() - 0.15) * (1 - inside)
    return (apart**2 / 0.6 * inside + outside).mean()


_LOSSES = {
    "hinge loss": (_hinge, _plain_hinge),
    "multi_margin_loss": (F.multi_margin_loss, _plain_multi_margin),
    "triplet loss": (_triplet, _plain_triplet),
    "L1 loss": (_l1, _plain_l1),
    "smooth L1 loss": (_huber, _plain_huber),
}


def _kinked_loss(name: str) -> Family:
    criterion, plain = _LOSSES[name]

    def make(seed: int, dtype: torch.dtype) -> Problem:
        return supervised(
            seed,
            dtype,
            lambda: mlp(nn.Tanh),
            data=many,
            criterion=criterion,
            plain_criterion=plain,
        )

    kind = "kinks shown" if name == "L1 loss" else "kinks hidden"
    return Family(name, kind, make)


# --- routing --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts that sends a sample to the ``top`` of four."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top = top
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 4)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        values, index = self.gate(x).topk(self.top, -1)
        weights = values.softmax(-1) if self.top > 1 else self._chances(x, index)
        out = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            rows, slot = (index == i).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return out

    def _chances(self, x: Tensor, index: Tensor) -> Tensor:
        return self.gate(x).softmax(-1).gather(-1, index)


class PlainExperts(Experts):
    """All of them, the others times zero."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        rank = scores.detach().argsort(-1, descending=True).argsort(-1)
        chosen = (rank < self.top).to(x.dtype)
        weights = scores.exp() * chosen
        weights = weights / (weights if self.top > 1 else scores.exp()).sum(-1, keepdim=True)
        outs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outs * weights[..., None]).sum(1)


def _routed(top: int) -> Family:
    def make(seed: int, dtype: torch.dtype) -> Problem:
        return supervised(seed, dtype, lambda: Experts(top), lambda: PlainExperts(top), data=many)

    return Family(f"mixture of experts, top {top}", "kinks hidden", make)


# --- convolutions ---------------------------------------------------------------------------------


class PlainMaxPool(nn.Module):
    """Of 2 × 2, by an index."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        return _picked(blocks, blocks.detach().argmax(-1, keepdim=True)).squeeze(-1)


class PlainBatchNorm(nn.Module):
    """In training mode, by its formula."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        scaled = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return scaled * self.weight.view(shape) + self.bias.view(shape)


def _pooled(pool: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), pool(), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 4))


def _normed(norm: Callable[[int], nn.Module], act: Callable[[Tensor], Tensor]) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, stride=2), norm(4), Act(act)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 9, 4))


def _max_pool(seed: int, dtype: torch.dtype) -> Problem:
    return supervised(
        seed,
        dtype,
        lambda: _pooled(lambda: nn.MaxPool2d(2)),
        lambda: _pooled(PlainMaxPool),
        data=pictures,
    )


def _batch_norm(scale: float) -> Callable[[int, torch.dtype], Problem]:
    @torch.no_grad()
    def shrink(model: nn.Module) -> None:
        model[0].weight *= scale

    def make(seed: int, dtype: torch.dtype) -> Problem:
        return supervised(
            seed,
            dtype,
            lambda: _normed(nn.BatchNorm2d, F.relu),
            lambda: _normed(PlainBatchNorm, _SHOWN["ReLU"][1]),
            data=pictures,
            change=shrink,
        )

    return make


# --- an embedding, most rows of which aren't used -----------------------------------------------


def _embedding(seed: int, dtype: torch.dtype, rows: int = 5000, used: int = 12) -> Problem:
    def build(count: int) -> nn.Module:
        hidden = [nn.Embedding(count, 6), nn.Flatten(), nn.Linear(18, 10), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(10, 4))

    def words() -> tuple[Tensor, Tensor]:
        return torch.randint(0, used, (64, 3)), clusters(64)[1]

    small = supervised(seed, dtype, lambda: build(used), data=words)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build(used)  # so that the data are the same
        x, y = words()
        places = torch.randperm(rows)[:used]
        table = torch.randn(rows, 6, dtype=dtype)
    model = build(rows).to(dtype)
    table[places] = small.params[0].detach()
    with torch.no_grad():
        for p, value in zip(model.parameters(), [table, *small.params[1:]], strict=True):
            p.copy_(value)

    def truth() -> Tensor:
        assert small.truth is not None
        return torch.cat([small.truth(), torch.zeros(6 * (rows - used)).double()]).sort().values

    return Problem(list(model.parameters()), lambda: F.cross_entropy(model(places[x]), y), truth)


FAMILIES = [
    *(_activation(name, *acts, climbs=_CLIMBS * (name == "ReLU")) for name, acts in _SHOWN.items()),
    Family("max-pool convolution", "kinks shown", _max_pool),
    Family("BatchNorm, ReLU", "kinks shown", _batch_norm(1.0)),
    Family("BatchNorm, ReLU, weights × 0.01", "kinks shown", _batch_norm(0.01)),
    Family("embedding of 5000 rows, 12 used", "kinks shown", _embedding, plain=False),
    *(
        _activation(name, *acts, climbs=_CLIMBS * (name == "where"))
        for name, acts in _HIDDEN.items()
    ),
    *(_activation(name, act, _plain_maxout) for name, act in _HALVING.items()),
    *map(_kinked_loss, _LOSSES),
    *map(_routed, (1, 2)),
]
