"""What the ops compute, bit by bit: their arithmetic in the buffers' dtype T, written with torch.

torch's own elementwise operations round once each and never contract, so elements can be asked for
to the last bit. Sums are given by their factors. Elements that no op writes are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.ops import reference
from op_inputs import F64, Inputs

Arguments = dict[str, Any]


@dataclass
class Products:
    """Sums as the products of rows, a·bᵀ, in float64."""

    a: Tensor
    b: Tensor

    def check(self, sums: Tensor) -> None:
        """Held against the sums of the terms' sizes."""
        a, b = self.a.double(), self.b.double()
        size = (a.abs() @ b.abs().T).reshape(sums.shape)
        # A part at a time: a product of long rows has larger errors than the ops'.
        parts = zip(a.split(4096, dim=1), b.split(4096, dim=1), strict=True)
        wanted = torch.stack([x @ y.T for x, y in parts]).sum(0)
        error = (sums - wanted.reshape(sums.shape)).abs()
        assert (error <= 1e-13 * size + 1e-300).all(), f"sums differ by {error.max()}"
        if self.a is self.b:
            assert torch.equal(sums, sums.T)


def number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=like.dtype)


def field(a: Arguments, k: int, name: str) -> Tensor:
    return ops.state_field(a["state"], k, name)


def combined(panel: Tensor, matrix: Tensor) -> Tensor:
    """Σ_i panel_i·matrix[i][j], i ascending, each product and sum rounded."""
    factors = matrix.to(panel.dtype)
    out = panel[0] * factors[0][:, None]
    for i in range(1, panel.shape[0]):
        out = out + panel[i] * factors[i][:, None]
    return out


class Segments:
    """Lists and buffers of a call as rows in T, with 0 where there is no segment."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.used = inputs, inputs.used

    def row(self, tensors: Sequence[Tensor]) -> Tensor:
        row = torch.zeros(self.inputs.n, dtype=self.inputs.buffer)
        for offset, t in zip(self.inputs.offsets, tensors, strict=True):
            row[offset : offset + t.numel()] = t.flatten().to(row.dtype)
        return row

    def inside(self, buffer: Tensor) -> Tensor:
        return torch.where(self.used, buffer, torch.zeros((), dtype=buffer.dtype))

    def written(self, buffer: Tensor) -> Tensor:
        return torch.where(self.used, buffer, math.nan)

    def listed(self, row: Tensor, storage: torch.dtype) -> list[Tensor]:
        counted = zip(self.inputs.offsets, self.inputs.counts, self.inputs.shapes, strict=True)
        return [row[o : o + count].to(storage).view(shape) for o, count, shape in counted]


def spread(a: Arguments, k: int, like: Tensor) -> Tensor:
    """What separations are taken times for what is added to θ, with a metric."""
    return a["metric"] * field(a, k, "displacement").to(like.dtype)[:, None]


def ascent(a: Arguments, inputs: Inputs) -> Arguments:
    s, q = Segments(inputs), a["q"]
    k, storage = q.shape[0], a["g1"].dtype
    times = number(field(a, 1, "transform") if k == 1 else 1.0, q)
    carried = s.inside(q) * times
    metric = a.get("metric")
    moved = carried if metric is None else carried * spread(a, k, q)
    if a.get("theta") is not None:
        here = s.row(a["theta"])
        moved = (here + moved).to(storage).to(q.dtype) - here
    gradient = s.inside(a["g1"]).to(q.dtype)
    y = (gradient - s.row(a["g0"])) + moved * number(a["weight_decay"], q)
    if metric is not None:
        y = y * metric * (1.0 / field(a, k, "displacement").to(q.dtype))[:, None]
        moved = torch.where(spread(a, k, q) == 0, 0.0, moved / spread(a, k, q))
    rows = [carried, y] + ([] if a.get("theta") is None else [moved])
    out: Arguments = {}
    w = y
    if a.get("p") is not None:
        w = (s.inside(a["p"]) * times) * number(a["momentum"], q) + y
        out["p_next"] = s.written(w)
    d = carried + w * number(a["sign"] * float(field(a, k, "beta")), q)
    rows += [d] if "p_next" in out else []
    stacked = torch.cat(rows)[:, s.used].double()
    return {**out, "d": s.written(d), "result": Products(stacked, stacked)}


def recenter(a: Arguments, inputs: Inputs) -> Arguments:
    s, k = Segments(inputs), a["q"].shape[0]
    pending, transform = (field(a, k, name) for name in ("pending", "transform"))

    def following(kept: Tensor, other: Tensor) -> Tensor:
        if k == 1:
            return kept if pending else other
        return combined(other, transform) if pending else kept

    q = following(a["q"], s.inside(a["d"]))
    away = q * number(transform, q) if k == 1 else q
    away = away if a.get("metric") is None else away * spread(a, k, q)
    copies = (s.row(a["theta"]) + s.inside(away)).to(a["copies"].dtype)
    out = {"q": s.written(q), "copies": s.written(copies)}
    if a.get("p") is not None:
        p = following(a["p"], a["p_next"])
        out["p"] = s.written(p) if k == 1 else p
    return out


def direction(a: Arguments, s: Segments, advance: bool = True) -> tuple[Tensor, Tensor]:
    """(what a step goes along, the next buffer)."""
    theta, g = s.row(a["theta"]), s.row(a["gradient"])
    u = g + theta * number(a["weight_decay"], theta)
    if a.get("buffer") is None:
        return u, u
    momentum = number(a["momentum"], theta)
    held = s.inside(a["buffer"])
    held = held * momentum + u if advance else held
    return (u + held * momentum if a.get("nesterov") else held), held


def refused(a: Arguments, k: int) -> bool:
    """Whether there is no step."""
    factor = 1.0 if a.get("factor") is None else float(a["factor"])
    return not (float(field(a, k, "accepted")) and math.isfinite(factor))


def slopes(a: Arguments, inputs: Inputs) -> Arguments:
    if refused(a, inputs.k):
        return {"result": torch.zeros(inputs.k, dtype=F64), **a}
    s = Segments(inputs)
    u, held = direction(a, s)
    vectors = float(field(a, a["panel"].shape[0], "pending"))
    panel = s.inside(a["panel"]).double()
    out: Arguments = {"result": Products(panel * vectors, u[None].double())}
    return out | ({"buffer": s.written(held)} if a.get("buffer") is not None else {})


def descend(a: Arguments, inputs: Inputs) -> Arguments:
    """Of a step without eigenvectors."""
    if refused(a, 1):
        return {"result": torch.zeros((), dtype=F64), **a}
    s, factor = Segments(inputs), 1.0 if a.get("factor") is None else float(a["factor"])
    h, gain = float(field(a, 1, "h_ema")), a["gain"] * factor
    lr = gain / h if h * a["max_lr"] > 1 else gain * a["max_lr"]
    u, held = direction(a, s)
    theta = s.row(a["theta"])
    theta = theta - u * number(lr, theta)
    out = {"theta": s.listed(theta, inputs.storage), "result": torch.tensor(lr, dtype=F64)}
    return out | ({"buffer": s.written(held)} if a.get("buffer") is not None else {})


def rates(a: Arguments, inputs: Inputs) -> Arguments:
    """Of a step along eigenvectors, whose weights may round in another order."""
    known = {"result": reference.descend_(**a)[1]}
    return {**a, **known} if refused(a, inputs.k) else known


def displace(a: Arguments, inputs: Inputs) -> Arguments:
    s, v = Segments(inputs), a["v"]
    here, v = s.row(a["theta"]), s.inside(v)
    copies = (here + v * number(a["step"], v)).to(inputs.storage)
    moved = copies.to(v.dtype) - here
    sums = Products(v[None].double(), torch.stack([moved, v]).double())
    return {"copies": s.listed(copies, inputs.storage), "result": sums}


def difference(a: Arguments, inputs: Inputs) -> Arguments:
    s, out = Segments(inputs), a["out"]
    value = (s.row(a["plus"]) - s.row(a["minus"])) * number(a["scale"], out)
    if a["weight_decay"]:
        value = value + s.inside(a["v"]) * number(a["weight_decay"], out)
    return {"out": s.written(value)}


def directional(a: Arguments, inputs: Inputs) -> Arguments:
    s = Segments(inputs)
    u, g0 = s.inside(a["u"]), s.row(a["g0"])
    rows = torch.stack([g0, s.row(a["g1"]) - g0, u]).double()
    return {"result": Products(u[None].double(), rows)}


def shut(a: Arguments) -> bool:
    return a["gate"] is not None and float(a["gate"]) == 0


def gram(a: Arguments, inputs: Inputs) -> Arguments:
    weights = a.get("weights", 1.0)
    left = (a["a"] * weights).double()
    if shut(a):
        return {"result": torch.zeros(len(left), len(a["b"]), dtype=F64)}
    same = a["b"] is a["a"]
    return {"result": Products(left, left if same else (a["b"] * weights).double())}


def combine(a: Arguments, inputs: Inputs) -> Arguments:
    return a if shut(a) else {"out": combined(a["panel"], a["matrix"])}


def project(a: Arguments, inputs: Inputs) -> Arguments:
    w = a["w"]
    for row, factor in zip(a["v"], a["coefficients"].to(w.dtype), strict=True):
        w = w - row * factor
    rows = torch.cat([a["v"], w[None]]).double()
    return {"w": w, "result": Products(rows, w[None].double())}
