"""The fp64 oracle of every op in `lyapcuda.ops.panel`: the same names, plain arithmetic in float64.

As in `lyapcuda.ops.reference`, nothing is mutated: what an op writes is returned, in float64. The
eigenproblem and the factorisations are LAPACK's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda.ops.flat import ESTIMATES
from lyapcuda.ops.panel import panel_field, panel_fields
from lyapcuda.ops.reference import curvature_of_growth, direction, error_bar, learning_rate


def panel_ascent_(
    q: Tensor,
    g0: Sequence[Tensor],
    g1: Tensor,
    offsets: Sequence[int],
    state: Tensor,
    *,
    sign: int = 1,
    weight_decay: float = 0.0,
    theta: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns (d, p_next, gram); elements outside the segments are NaN in d and p_next."""
    k = q.shape[0]
    rate = sign * float(panel_field(state, k, "beta"))
    d = torch.full_like(q, math.nan, dtype=torch.float64)
    p_next = None if p is None else torch.full_like(d, math.nan)
    rows = (2 + (theta is not None) + (p is not None)) * k
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for i, offset in enumerate(offsets):
        span = slice(offset, offset + g0[i].numel())
        carried = q[:, span].double()
        moved = carried
        if theta is not None:
            # Rounding is part of the definition here: done as panel_recenter_ does it.
            here = theta[i].flatten()
            there = (here.to(q.dtype) + q[:, span]).to(here.dtype)
            moved = (there.to(q.dtype) - here.to(q.dtype)).double()
        y = g1[:, span].double() - g0[i].double().flatten() + weight_decay * moved
        w = y
        if p is not None:
            w = momentum * p[:, span].double() + y
            p_next[:, span] = w
        d[:, span] = carried + rate * w
        stack = [carried, y]
        stack += [moved] if theta is not None else []
        stack += [d[:, span]] if p is not None else []
        panel = torch.cat(stack)
        gram += panel @ panel.T
    return d, p_next, gram


def _unpack(state: Tensor, k: int) -> dict[str, Tensor]:
    return {name: panel_field(state, k, name).clone() for name in panel_fields(k)}


def _pack(fields: dict[str, Tensor]) -> Tensor:
    return torch.cat([field.flatten() for field in fields.values()])


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor; None where there is none, or a pivot is rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or bool((factor.diag() ** 2 <= 1e-12 * matrix.diag()).any()):
        return None
    return factor


def _lost(matrix: Tensor) -> int:
    """The first row that lies in the span of those before, by the same pivots; k: none does."""
    left = matrix.clone()
    for p, pivot in enumerate(matrix.diag().tolist()):
        if not float(left[p, p]) > 1e-12 * pivot:
            return p
        left = left - torch.outer(left[:, p], left[p]) / left[p, p]
    return len(matrix)


def _ask_reseed(s: dict[str, Tensor], row: int, k: int) -> None:
    s["reseed"].fill_(row + 1.0 if row < k else 0.0)
    s["reseeds"] += float(row < k)


def _forms(matrix: Tensor, vectors: Tensor) -> Tensor:
    return ((matrix @ vectors) * vectors).sum(0)


def ritz(a: Tensor, b: Tensor, sign: int) -> tuple[Tensor, Tensor] | None:
    """Values and vectors of a·u = λ·b·u, the wanted end first; the largest entry positive."""
    factor = _cholesky(b)
    if factor is None:
        return None
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, z = torch.linalg.eigh((whitened + whitened.T) / 2)
    if sign > 0:
        values, z = values.flip(0), z.flip(1)
    u = torch.linalg.solve_triangular(factor.T, z, upper=True)
    peaks = u.gather(0, u.abs().argmax(0, keepdim=True))
    return values, u * torch.where(peaks < 0, -1.0, 1.0)


def benettin_(
    state: Tensor,
    gram: Tensor,
    losses: Tensor,
    k: int,
    *,
    sign: int = 1,
    estimate: int = 0,
    momentum: float = 0.0,
    realised: bool = False,
    control: bool = True,
    alternate: bool = True,
    rotate: bool = True,
    ema: float = 0.0,
) -> Tensor:
    """Returns the state after the step."""
    s = _unpack(state, k)
    name = {number: key for key, number in ESTIMATES.items()}[estimate]

    def block(i: int, j: int) -> Tensor:
        return gram[i * k : (i + 1) * k, j * k : (j + 1) * k]

    def refused(lost: int = k) -> Tensor:
        out = _unpack(state, k)
        _ask_reseed(out, lost, k)
        for field in ("accepted", "pending", "again"):
            out[field].zero_()
        out["skipped"] += 1
        return _pack(out)

    moved = 2 if realised else 0
    if not (bool(gram.isfinite().all()) and bool(losses.isfinite().all())):
        return refused()
    cc, cy, yy = block(0, 0), block(0, 1), block(1, 1)
    cm, my, mm = block(0, moved), block(moved, 1), block(moved, moved)
    good = (cc.diag() > 0) & (cm.diag() > 0)
    if not bool(good.all()):
        return refused(good.tolist().index(False))
    pairs = ritz((cy + cy.T) / 2, (cm + cm.T) / 2, sign)
    if pairs is None:
        return refused(_lost((cm + cm.T) / 2))
    values, u = pairs
    size = _forms(mm, u)
    squares = _forms(yy, u) - 2 * values * _forms(my, u) + values**2 * size
    residual = (squares.clamp(min=0) / size).sqrt()
    secant = (_forms(yy, u) / size).sqrt()
    v = u / u.norm(dim=0) if rotate else torch.eye(k, dtype=torch.float64)
    before = _forms(cc, v)
    if not bool((before > 0).all()):
        return refused()

    past = s["rayleigh"].tolist(), s["residual"].tolist()
    bars = [
        error_bar(*numbers, name, alternate)
        for numbers in zip(values.tolist(), residual.tolist(), *past, strict=True)
    ]
    s["center"], s["width"] = torch.tensor(bars, dtype=torch.float64).unbind(1)
    s["rayleigh"], s["residual"] = values, residual

    beta = float(s["beta"])
    rate = sign * beta
    last = 2 + realised
    dd = block(last, last) if momentum else cc + rate * (cy + cy.T) + rate**2 * yy
    dd = v.T @ dd @ v
    factor = _cholesky((dd + dd.T) / 2)
    met = factor is None
    h = s["center"].clone()
    if not met:
        s["r"] = factor.T
        side = -1.0 if alternate else 1.0
        scaled = v * (side * float(s["perturbation"]))
        s["transform"] = torch.linalg.solve_triangular(s["r"], scaled, upper=True, left=False)
        if beta != 0:
            s["exponent"] = (s["r"].diag() / before.sqrt()).log()
            if name in ("growth", "paper"):
                for i in range(k):
                    found = curvature_of_growth(float(s["exponent"][i]), rate, momentum, name)
                    h[i] = found if math.isfinite(found) else h[i]
    spread = 0.0 if met else float(dd.diag().max() / s["r"].diag().square().min())
    s["pending"].fill_(float(not met))
    s["again"].fill_(float(spread > 1e6))
    s["h"] = h
    s["h_ema"] = torch.where(s["h_ema"].isfinite(), ema * s["h_ema"] + (1 - ema) * h, h)
    if control:
        s["beta"].fill_(_next_rate(s, values, residual, secant, sign, name, met))
    again = met and not control
    _ask_reseed(s, int(v[:, _lost((dd + dd.T) / 2)].abs().argmax()) if again else k, k)
    s["accepted"].fill_(1.0)
    s["steps"] += 1
    return _pack(s)


def _next_rate(
    s: dict[str, Tensor],
    values: Tensor,
    residual: Tensor,
    secant: Tensor,
    sign: int,
    name: str,
    met: bool,
) -> float:
    """β of the next step; takes the secants into bound and guard."""
    beta = float(s["beta"])
    if met:
        return beta / 2
    if name == "paper":
        exponent = float(s["exponent"][0])
        return beta / exponent if beta and exponent and abs(beta / exponent) <= 1e38 else beta
    seen = secant if sign > 0 else values.abs() + residual
    largest = float(seen.max())
    if largest == 0 or not math.isfinite((math.e - 1) / largest):
        return beta
    settled = (sign * values < 0) & (residual < values.abs())
    guard = max([float(s["guard"]), *secant[settled].tolist()])
    bound = max(largest, (0.98 if sign > 0 else 1.0) * float(s["bound"]))
    s["guard"].fill_(guard)
    s["bound"].fill_(bound)
    return min((math.e - 1) / max(bound, guard), 1e38)


def benettin_refine_(state: Tensor, gram: Tensor, k: int) -> Tensor:
    """Returns the state after the second pass."""
    s = _unpack(state, k)
    if float(s["again"]) == 0:
        return state.clone()
    s["again"].zero_()
    square = float(s["perturbation"]) ** 2
    factor = _cholesky(gram / square) if bool(gram.isfinite().all()) else None
    if factor is None:
        s["pending"].zero_()
        if bool(gram.isfinite().all()):
            _ask_reseed(s, _lost(gram / square), k)
        return _pack(s)
    s["r"] = factor.T @ s["r"]
    s["transform"] = torch.linalg.inv(factor.T)
    s["exponent"] = s["exponent"] + factor.diag().log()
    return _pack(s)


def panel_recenter_(
    q: Tensor, d: Tensor, theta: Sequence[Tensor], offsets: Sequence[int], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (q, copies); elements outside the segments stay in q, and are NaN in copies."""
    k = q.shape[0]
    moved = q.double().clone()
    copies = torch.full_like(moved, math.nan)
    transform = panel_field(state, k, "transform")
    pending = float(panel_field(state, k, "pending")) != 0
    for here, offset in zip(theta, offsets, strict=True):
        span = slice(offset, offset + here.numel())
        if pending:
            moved[:, span] = transform.T @ d[:, span].double()
        copies[:, span] = here.double().flatten() + moved[:, span]
    return moved, copies


def gram(a: Tensor, b: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """Returns a·bᵀ, or zeros where the gate is closed."""
    if gate is not None and float(gate) == 0:
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    return a.double() @ b.double().T


def combine_(out: Tensor, panel: Tensor, matrix: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """Returns out."""
    if gate is not None and float(gate) == 0:
        return out.double()
    return matrix.T @ panel.double()


def project_(w: Tensor, v: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (w, products)."""
    left = w.double() - coefficients @ v.double()
    return left, torch.cat([v.double() @ left, (left @ left)[None]])


# --- the quasi-Newton step -----------------------------------------------------------------------


def _rates(state: Tensor, k: int, gain: float, max_lr: float) -> list[float] | None:
    """Along the k vectors, and off them; None where there is no step."""
    fields = _unpack(state, k)
    h = fields["h_ema"].abs()
    if not float(fields["accepted"]) or not math.isfinite(gain) or not bool(h.isfinite().all()):
        return None
    rest = float(h[-1] + fields["residual"][-1])
    curvatures = [max(float(value), rest) for value in h]
    off = rest if float(fields["pending"]) else max(curvatures)
    return [learning_rate(value, gain, max_lr) for value in [*curvatures, off]]


def panel_slopes_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    offsets: Sequence[int],
    panel: Tensor,
    state: Tensor,
    *,
    buffer: Tensor | None = None,
    factor: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns (slopes, buffer)."""
    k = panel.shape[0]
    slopes = torch.zeros(k, dtype=torch.float64)
    if _rates(state, k, 1.0 if factor is None else float(factor), 1.0) is None:
        return slopes, None if buffer is None else buffer.double()
    us, following = direction(theta, gradient, buffer=buffer, offsets=offsets, **options)
    if float(panel_field(state, k, "pending")):
        for u, offset in zip(us, offsets, strict=True):
            slopes += panel[:, offset : offset + u.numel()].double() @ u.flatten()
    return slopes, following


def panel_descend_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    offsets: Sequence[int],
    panel: Tensor,
    state: Tensor,
    slopes: Tensor,
    *,
    gain: float = 1.0,
    max_lr: float = 10.0,
    buffer: Tensor | None = None,
    factor: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor]:
    """Returns (theta, rates)."""
    k = panel.shape[0]
    rates = _rates(state, k, gain * (1.0 if factor is None else float(factor)), max_lr)
    if rates is None or not bool(slopes.isfinite().all()):
        return [t.double() for t in theta], torch.zeros(k + 1, dtype=torch.float64)
    us, _ = direction(theta, gradient, buffer=buffer, offsets=offsets, advance=False, **options)
    fields = _unpack(state, k)
    transform, size = fields["transform"], float(fields["perturbation"])
    extra = torch.tensor([rate - rates[-1] for rate in rates[:-1]], dtype=torch.float64)
    weights = transform @ (extra * (transform.T @ slopes) / size**2)
    moved = []
    for t, u, offset in zip(theta, us, offsets, strict=True):
        step = rates[-1] * u
        if float(fields["pending"]):
            rows = panel[:, offset : offset + t.numel()].double()
            step = step + (weights @ rows).view(t.shape)
        moved.append(t.double() - step)
    return moved, torch.tensor(rates, dtype=torch.float64)
