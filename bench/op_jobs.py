"""Every op on one set of data, beside the fastest eager code for the same job that we know of.

Eager code is tuned: it writes into buffers made once, takes dot and matrix products for sums, and
goes over the data either whole or a tile at a time, so that a tile stays in the cache from one
torch call to the next. Where an op sums in float64, eager code has to convert; a second form sums
in float32. Scalars are numbers on the host, which costs eager code nothing here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lyapcuda import ops

Call = Callable[[], object]

#: Of q.
SIZE = 5e-2
#: Of a step: so small that everything stays finite, however often.
TINY = 1e-9
#: Elements of a tile of all rows together. The smaller ones stay in a core's second cache.
TILES = {"small tiles": 1 << 16, "large tiles": 1 << 18}


@dataclass(frozen=True)
class Job:
    """An op's call, what it has to move, and eager code for the same."""

    op: str
    k: int
    #: Bytes that have to move, fp32.
    bytes: float
    ours: Call
    #: By the type that they sum in, or "eager" where there are no sums; then by name.
    rivals: dict[str, dict[str, Call]]
    #: Products of doubles, summed.
    products: float = 0.0


@dataclass
class Data:
    """fp32 buffers of n elements in so many tensors, and panels of k rows."""

    n: int
    k: int
    tensors: int = 1
    device: str = "cpu"
    #: Of θ and of g: one tensor each, or several.
    offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        n, k = self.n, self.k
        torch.manual_seed(0)
        # One after another, so that eager code can take their products at once.
        self.stack = torch.empty(3 * k, n, device=self.device)
        self.q, self.y, self.d = self.stack.view(3, k, n)
        self.q.normal_(std=SIZE / n**0.5)
        self.d.normal_(std=SIZE / n**0.5)
        self.g1 = torch.empty(k, n, device=self.device).normal_(std=TINY)
        flat = {name: torch.empty(n, device=self.device).normal_() for name in ("theta", "g0")}
        bounds = [i * n // self.tensors for i in range(self.tensors + 1)]
        spans = list(itertools.pairwise(bounds))
        self.offsets, self.sizes = bounds[:-1], [b - a for a, b in spans]
        # Each a tensor of its own where there are several, as a model's parameters are.
        self.theta = [flat["theta"][a:b].clone() for a, b in spans]
        self.g0 = [flat["g0"][a:b].mul_(TINY).clone() for a, b in spans]
        self.one = torch.empty(n, device=self.device).normal_(std=SIZE / n**0.5)
        self.metric = torch.empty(n, device=self.device).uniform_(0.5, 1.0)
        # A rotation: repeated in place, panels keep their size.
        turn = torch.ones(1, 1, dtype=torch.float64)
        if k > 1:
            turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0].contiguous()
        self.turn = turn.to(self.device)
        self.small = self.turn.float()
        self.state = ops.new_state(
            self.device, k, perturbation=SIZE, beta=0.5, pending=1.0, accepted=1.0, h_ema=1e3,
            residual=1.0, transform=self.turn,
        )  # fmt: skip

    def new(self, *shape: int, wide: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64 if wide else None, device=self.device)

    def spans(self, tile: int | None) -> Iterator[tuple[int, int, int]]:
        """(tensor, first element, one past the last) of every tile, within one tensor each."""
        for number, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            for start in range(0, size, tile or size):
                yield number, offset + start, offset + min(start + (tile or size), size)

    def cut(self, tile: int | None, *arrays: Tensor | list[Tensor]) -> list[tuple[Tensor, ...]]:
        """Views of every tile, made once: of flat buffers, panels, and lists of tensors."""
        out = []
        for number, a, b in self.spans(tile):
            here = self.offsets[number]
            out.append(
                tuple(
                    x[number][a - here : b - here] if isinstance(x, list) else x[..., a:b]
                    for x in arrays
                )
            )
        return out

    def tiles(self, rows: int) -> dict[str, int | None]:
        """The sizes worth trying for a panel of so many rows."""
        found: dict[str, int | None] = {"whole": None}
        found |= {name: max(size // rows, 1024) for name, size in TILES.items()}
        return {name: size for name, size in found.items() if size is None or size < self.n}


class Sums:
    """The Gram matrix of rows, or their products with others, summed over tiles."""

    def __init__(self, data: Data, rows: int, columns: int, tile: int | None, wide: bool) -> None:
        self.wide = wide
        self.total = data.new(rows, columns, wide=wide)
        longest = min(tile or data.n, data.n)
        self.a = data.new(rows, longest, wide=True) if wide else None
        self.b = data.new(columns, longest, wide=True) if wide else None

    def zero(self) -> None:
        self.total.zero_()

    def gram(self, a: Tensor) -> None:
        if self.a is not None:
            a = self.a[:, : a.shape[1]].copy_(a)
        self.total.addmm_(a, a.t())

    def products(self, a: Tensor, b: Tensor) -> None:
        if self.a is not None and self.b is not None:
            a, b = self.a[:, : a.shape[1]].copy_(a), self.b[:, : b.shape[1]].copy_(b)
        self.total.addmm_(a, b.t())

    def dots(self, q: Tensor, y: Tensor) -> None:
        """The three of two vectors."""
        if self.a is not None:
            q, y = self.a[0, : len(q)].copy_(q), self.a[1, : len(q)].copy_(y)
        flat = self.total.view(-1)
        for i, (a, b) in enumerate(((q, q), (q, y), (y, y))):
            flat[i] += torch.dot(a, b)


def by_sums(data: Data, rows: int, make: Callable[[int | None, bool], Call]):
    """The rivals of an op that sums: both types, every size of tiles."""
    rivals: dict[str, dict[str, Call]] = {}
    for name, tile in data.tiles(rows).items():
        rivals.setdefault("float32", {})[name] = make(tile, False)
        if tile or data.n <= 10**6:  # a whole panel as float64: only where that is small
            rivals.setdefault("float64", {})[name] = make(tile, True)
    return rivals


def by_tiles(data: Data, rows: int, make: Callable[[int | None], Call]):
    """The rivals of an op without sums."""
    return {"eager": {name: make(tile) for name, tile in data.tiles(rows).items()}}


# --- a step --------------------------------------------------------------------------------------


def ascent(data: Data, momentum: bool = False, metric: bool = False) -> Job:
    """At most one of momentum and a metric, whose displacements are 1."""
    k, beta, m = data.k, 0.5, 0.9 if momentum else 0.0
    p = data.new(k, data.n) if momentum else None
    p_next = data.new(k, data.n) if momentum else None
    more = {"momentum": m, "p": p, "p_next": p_next} if momentum else {}
    more |= {"metric": data.metric} if metric else {}

    def make(tile: int | None, wide: bool, dots: bool = False) -> Call:
        blocks = 3 if momentum else 2
        stack = data.stack[: blocks * k]
        if dots:
            views = data.cut(tile, data.q[0], data.y[0], stack, data.g1[0], data.g0, data.d[0])
        else:
            views = data.cut(tile, data.q, data.y, stack, data.g1, data.g0, data.d)
        beside = data.cut(tile, p, p_next) if momentum else [()] * len(views)
        metrics = data.cut(tile, data.metric)
        sums = Sums(data, blocks * k, blocks * k, tile, wide)

        def call() -> Tensor:
            sums.zero()
            for (q, y, rows, g1, g0, d), extra, (s,) in zip(views, beside, metrics, strict=True):
                torch.sub(g1, g0, out=y)
                if metric:
                    y.mul_(s)
                if extra:
                    torch.add(y, extra[0], alpha=m, out=extra[1])
                    torch.add(q, extra[1], alpha=beta, out=d)
                else:
                    torch.add(q, y, alpha=beta, out=d)
                if dots:
                    sums.dots(q, y)
                else:
                    sums.gram(rows)
            return sums.total

        return call

    rivals = by_sums(data, 4 * k, make)
    if k == 1 and not momentum and not metric:
        for wide, kind in ((False, "float32"), (True, "float64")):
            for name, tile in data.tiles(4).items():
                if not wide or tile or data.n <= 10**6:
                    rivals[kind][f"{name}, dot"] = make(tile, wide, dots=True)
    call = (data.d, data.q, data.g0, data.g1, data.offsets, data.state)
    return Job(
        "ascent_" + ", momentum" * momentum + ", metric" * metric,
        k,
        (12.0 * k + 4 + 8.0 * k * momentum + 4.0 * metric) * data.n,
        lambda: ops.ascent_(*call, **more),
        rivals,
        k * (2 * k + 1) * data.n,
    )


def recenter(data: Data, metric: bool = False) -> Job:
    k = data.k

    def make(tile: int | None) -> Call:
        views = data.cut(tile, data.q, data.d, data.theta, data.metric)
        transposed, scale = data.small.t(), float(data.small[0, 0])

        def one() -> None:
            for q, d, theta, s in views:
                if metric:
                    torch.addcmul(theta, q[0], s, value=scale, out=d[0])
                else:
                    torch.add(theta, q[0], alpha=scale, out=d[0])

        def several() -> None:
            for q, d, theta, s in views:
                torch.mm(transposed, d, out=q)
                if metric:
                    torch.addcmul(theta, q, s, out=d)
                else:
                    torch.add(theta, q, out=d)

        return one if k == 1 else several

    call = (data.q, data.d, data.d, data.theta, data.offsets, data.state)
    size = (12.0 if k == 1 else 12.0 * k + 4) + 4 * metric
    more = {"metric": data.metric} if metric else {}
    return Job(
        "recenter_" + ", metric" * metric,
        k,
        size * data.n,
        lambda: ops.recenter_(*call, **more),
        by_tiles(data, 2 * k, make),
    )


def reseed(data: Data, lost: bool) -> Job:
    state = data.state.clone()
    ops.state_field(state, data.k, "reseed").fill_(1.0 if lost else 0.0)
    call = (data.q, data.offsets, data.sizes, state)
    std = SIZE / data.n**0.5

    def make(tile: int | None) -> Call:
        views = data.cut(tile, data.q[0])

        def call() -> None:
            if lost:
                for (row,) in views:
                    row.normal_(std=std)

        return call

    return Job(
        "reseed_, lost" if lost else "reseed_",
        data.k,
        4.0 * data.n * lost,
        lambda: ops.reseed_(*call, elements=data.n),
        {"eager": {"whole": make(None)}},
    )


# --- training steps ------------------------------------------------------------------------------


def descend(data: Data, momentum: float = 0.0, weight_decay: float = 0.0) -> Job:
    """Along one direction, as SGD."""
    state = ops.new_state(data.device, 1, accepted=1.0, h_ema=1e3, residual=1.0)
    flat = data.one if momentum else None
    options = {"max_lr": TINY, "momentum": momentum, "weight_decay": weight_decay}
    if momentum:
        options |= {"buffer": flat, "offsets": data.offsets}

    def make(tile: int | None) -> Call:
        views = data.cut(tile, data.theta, data.g0, data.one, data.y[0])

        def call() -> None:
            for theta, g, buffer, u in views:
                if momentum:
                    buffer.mul_(momentum).add_(g)
                    if weight_decay:
                        buffer.add_(theta, alpha=weight_decay)
                    theta.sub_(buffer, alpha=TINY)
                elif weight_decay:
                    torch.add(g, theta, alpha=weight_decay, out=u)
                    theta.sub_(u, alpha=TINY)
                else:
                    theta.sub_(g, alpha=TINY)

        return call

    def fused() -> None:
        buffers = [view for (view,) in data.cut(None, data.one)] if momentum else []
        options = dict(dampening=0.0, nesterov=False, maximize=False, is_first_step=False)
        options |= {"lr": TINY, "momentum": momentum, "weight_decay": weight_decay}
        torch._fused_sgd_(data.theta, data.g0, buffers, **options)

    name = "descend_" + ", momentum" * bool(momentum) + ", weight decay" * bool(weight_decay)
    return Job(
        name,
        1,
        (12.0 + 8 * bool(momentum)) * data.n,
        lambda: ops.descend_(data.theta, data.g0, state, **options),
        by_tiles(data, 4, make) | {"fused SGD": {"whole": fused}},
    )


def newton(data: Data) -> tuple[Job, Job]:
    """The slopes, and the step along the panel's rows."""
    k, call = data.k, (data.theta, data.g0, data.offsets, data.d, data.state)
    slopes = ops.slopes_(*call)
    rates = torch.full((k,), TINY, device=data.device)
    options = {"gain": TINY, "offsets": data.offsets, "panel": data.d, "slopes": slopes}

    def of_slopes(tile: int | None, wide: bool) -> Call:
        views = data.cut(tile, data.d, data.g0)
        sums = Sums(data, k, 1, tile, wide)

        def call() -> Tensor:
            sums.zero()
            for d, g in views:
                sums.products(d, g[None])
            return data.small.t() @ sums.total.float()

        def vectors() -> Tensor:
            (d, g), total = views[0], sums.total.view(-1)
            return data.small.t() @ torch.mv(d, g, out=total)

        return vectors if len(views) == 1 and not wide else call

    def of_step(tile: int | None) -> Call:
        views = data.cut(tile, data.d, data.g0, data.theta)
        along = slopes.float()

        def call() -> None:
            turned = data.small @ ((rates - TINY) * (data.small.t() @ along))
            for d, g, theta in views:
                theta.sub_(g, alpha=TINY).addmv_(d.t(), turned, alpha=-1.0)

        return call

    return (
        Job(
            "slopes_",
            k,
            (4.0 * k + 4) * data.n,
            lambda: ops.slopes_(*call),
            by_sums(data, k + 1, of_slopes),
            k * data.n,
        ),
        Job(
            "descend_, panel",
            k,
            (4.0 * k + 12) * data.n,
            lambda: ops.descend_(data.theta, data.g0, data.state, **options),
            by_tiles(data, k + 2, of_step),
        ),
    )


# --- products of the Hessian ---------------------------------------------------------------------


def displace(data: Data) -> Job:
    step = torch.full((1,), 0.25, dtype=torch.float64, device=data.device)
    copies = [torch.empty_like(theta) for theta in data.theta]

    def make(tile: int | None, wide: bool) -> Call:
        views = data.cut(tile, copies, data.theta, data.stack[0], data.stack[:2], data.stack[1])
        sums = Sums(data, 2, 2, tile, wide)

        def call() -> Tensor:
            sums.zero()
            for there, theta, v, rows, moved in views:
                torch.add(theta, v, alpha=0.25, out=there)
                torch.sub(there, theta, out=moved)
                sums.gram(rows)
            return sums.total

        return call

    rivals = by_sums(data, 5, make)
    return Job(
        "displace_",
        1,
        12.0 * data.n,
        lambda: ops.displace_(copies, data.q[0], data.theta, data.offsets, step),
        rivals,
    )


def difference(data: Data, weight_decay: float = 0.0) -> Job:
    scale = torch.full((1,), 2.0, dtype=torch.float64, device=data.device)
    out, options = data.y[0], {}
    if weight_decay:
        options = {"weight_decay": weight_decay, "v": data.one}
    call = (out, data.g0, data.theta, data.offsets, scale)

    def make(tile: int | None) -> Call:
        views = data.cut(tile, data.y[0], data.g0, data.theta, data.one)

        def call() -> None:
            for there, plus, minus, v in views:
                torch.sub(plus, minus, out=there).mul_(2.0)
                if weight_decay:
                    there.add_(v, alpha=weight_decay)

        return call

    return Job(
        "difference_" + ", weight decay" * bool(weight_decay),
        1,
        (12.0 + 4 * bool(weight_decay)) * data.n,
        lambda: ops.difference_(*call, **options),
        by_tiles(data, 4, make),
    )


def directional(data: Data) -> Job:
    """Along q[0], of g0 and of what stands in for g1."""
    u, g1 = data.q[0], data.theta

    def make(tile: int | None, wide: bool) -> Call:
        views, changes = data.cut(tile, u, data.g0, g1), data.cut(tile, data.y[0])
        sums, square = Sums(data, 1, 2, tile, wide), Sums(data, 1, 1, tile, wide)
        both = torch.empty(2, min(tile or data.n, data.n), device=data.device)

        def call() -> tuple[Tensor, Tensor]:
            sums.zero(), square.zero()
            for u, here, there in views:
                rows = both[:, : len(u)]
                rows[0].copy_(here)
                torch.sub(there, here, out=rows[1])
                sums.products(u[None], rows)
                square.gram(u[None])
            return sums.total, square.total

        def dots() -> Tensor:
            total = sums.total.new_zeros(3)
            for (u, here, there), (change,) in zip(views, changes, strict=True):
                torch.sub(there, here, out=change)
                for i, row in enumerate((here, change, u)):
                    total[i] += torch.dot(u, row)
            return total

        return call if wide else dots

    return Job(
        "directional_products",
        1,
        12.0 * data.n,
        lambda: ops.directional_products(u, data.g0, g1, data.offsets),
        by_sums(data, 4, make),
        3.0 * data.n,
    )


# --- panels as matrices --------------------------------------------------------------------------


def gram(data: Data, symmetric: bool, weighted: bool = False) -> Job:
    """``weighted``: of a symmetric one."""
    k = data.k
    b = data.q if symmetric else data.d
    weights = data.metric if weighted else None

    def make(tile: int | None, wide: bool) -> Call:
        views = data.cut(tile, data.q, b, data.metric, data.y)
        sums = Sums(data, k, k, tile, wide)

        def call() -> Tensor:
            sums.zero()
            for a, b, s, aside in views:
                if weighted:
                    sums.gram(torch.mul(a, s, out=aside))
                elif symmetric:
                    sums.gram(a)
                else:
                    sums.products(a, b)
            return sums.total

        def dot() -> Tensor:
            return torch.dot(*(x[0] for x in views[0][:2]))

        return dot if k == 1 and len(views) == 1 and not wide and not weighted else call

    return Job(
        "gram" + ", symmetric" * symmetric + ", weights" * weighted,
        k,
        4.0 * (k * (1 if symmetric else 2) + weighted) * data.n,
        lambda: ops.gram(data.q, b, weights=weights),
        by_sums(data, k * (1 if symmetric else 2), make),
        k * (k + 1) / 2 * data.n if symmetric else k * k * data.n,
    )


def combine(data: Data, in_place: bool) -> Job:
    k, out = data.k, data.d if in_place else data.g1

    def make(tile: int | None) -> Call:
        views = data.cut(tile, data.d, out)
        aside = data.new(k, min(tile or data.n, data.n)) if in_place else None
        transposed = data.small.t()

        def call() -> None:
            for panel, there in views:
                if aside is None:
                    torch.mm(transposed, panel, out=there)
                else:
                    turned = aside[:, : panel.shape[1]]
                    torch.mm(transposed, panel, out=turned)
                    there.copy_(turned)

        def scaled() -> None:
            for panel, there in views:
                torch.mul(panel, float(data.small[0, 0]), out=there)

        return scaled if k == 1 else call

    return Job(
        "combine_, in place" if in_place else "combine_",
        k,
        8.0 * k * data.n,
        lambda: ops.combine_(out, data.d, data.turn),
        by_tiles(data, 2 * k, make),
    )


def project(data: Data) -> Job:
    """k is the number of vectors."""
    k, w, v = data.k, data.one, data.d
    c = torch.full((k,), TINY, dtype=torch.float64, device=data.device)
    narrow = c.float()

    def make(tile: int | None, wide: bool) -> Call:
        views = data.cut(tile, w, v)
        sums, square = Sums(data, k, 1, tile, wide), Sums(data, 1, 1, tile, wide)

        def call() -> tuple[Tensor, Tensor]:
            sums.zero(), square.zero()
            for w, v in views:
                w.addmv_(v.t(), narrow, alpha=-1.0)
                sums.products(v, w[None])
                if wide:
                    here = sums.b[:, : len(w)]
                    square.total.addmm_(here, here.t())
                else:
                    square.total += torch.dot(w, w)
            return sums.total, square.total

        def vectors() -> tuple[Tensor, Tensor]:
            w, v = views[0]
            w.addmv_(v.t(), narrow, alpha=-1.0)
            return torch.mv(v, w, out=sums.total.view(-1)), torch.dot(w, w)

        return vectors if len(views) == 1 and not wide else call

    return Job(
        "project_",
        k,
        (4.0 * k + 8) * data.n,
        lambda: ops.project_(w, v, c),
        by_sums(data, k + 1, make),
        (k + 1.0) * data.n,
    )


# --- all of them ---------------------------------------------------------------------------------

#: Rows: of the ops over k separations, of the products of panels, of project_.
ROWS = (1, 2, 4, 14, 32)
GRAMS = (1, 4, 14, 32)
PROJECTIONS = (1, 5, 14)


def jobs(data: Data, only: Sequence[str] | None = None) -> Iterator[Callable[[], Job]]:
    """Those of the data's k, to make one at a time, as each has buffers of its own; or ``only`` of
    the ops with these names."""
    k = data.k
    made: list[tuple[str, bool, Callable[[], Job]]] = [
        ("ascent_", k in ROWS, lambda: ascent(data)),
        ("ascent_", k in (1, 4), lambda: ascent(data, momentum=True)),
        ("ascent_", k in (1, 4), lambda: ascent(data, metric=True)),
        ("recenter_", k in ROWS, lambda: recenter(data)),
        ("recenter_", k in (1, 4), lambda: recenter(data, metric=True)),
        ("slopes_", k in ROWS[1:], lambda: newton(data)[0]),
        ("descend_", k in ROWS[1:], lambda: newton(data)[1]),
        ("gram", k in GRAMS, lambda: gram(data, symmetric=True)),
        ("gram", k in (1, 4), lambda: gram(data, symmetric=True, weighted=True)),
        ("gram", k in GRAMS, lambda: gram(data, symmetric=False)),
        ("combine_", k in GRAMS, lambda: combine(data, in_place=False)),
        ("combine_", k in GRAMS, lambda: combine(data, in_place=True)),
        ("project_", k in PROJECTIONS, lambda: project(data)),
        ("descend_", k == 1, lambda: descend(data)),
        ("descend_", k == 1, lambda: descend(data, 0.0, 0.1)),
        ("descend_", k == 1, lambda: descend(data, 0.9)),
        ("descend_", k == 1, lambda: descend(data, 0.9, 0.1)),
        ("displace_", k == 1, lambda: displace(data)),
        ("difference_", k == 1, lambda: difference(data)),
        ("difference_", k == 1, lambda: difference(data, 0.1)),
        ("directional_products", k == 1, lambda: directional(data)),
        ("reseed_", k in (1, 4), lambda: reseed(data, lost=False)),
        ("reseed_", k in (1, 4), lambda: reseed(data, lost=True)),
    ]
    for name, here, make in made:
        if here and (only is None or name in only):
            yield make
