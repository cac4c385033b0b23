"""The fp64 oracle of every op: the same names and arguments, plain arithmetic in float64.

Slow and simple on purpose. Nothing is mutated: what an op writes is returned, in float64, before
any rounding to the buffers' dtypes. The eigenproblem and the factorisations are LAPACK's. Tests
hold every backend against these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyapcuda.ops.state import ESTIMATES, state_field, state_fields

# --- a step --------------------------------------------------------------------------------------


def _multiple(state: Tensor, k: int) -> float:
    """What q and p are to be taken times: the transform for k = 1, else they are as they lie."""
    return float(state_field(state, 1, "transform")) if k == 1 else 1.0


def spread(
    state: Tensor, k: int, metric: Tensor | None, span: slice, dtype: torch.dtype = torch.float64
) -> Tensor | float:
    """What separations are taken times for what is added to θ: displacement_j·S, or 1."""
    if metric is None:
        return 1.0
    return state_field(state, k, "displacement").to(dtype)[:, None] * metric[span].to(dtype)


def ascent_(
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
    metric: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns (d, p_next, gram); elements outside the segments are NaN in d and p_next."""
    k = q.shape[0]
    times, rate = _multiple(state, k), sign * float(state_field(state, k, "beta"))
    d = torch.full_like(q, math.nan, dtype=torch.float64)
    p_next = None if p is None else torch.full_like(d, math.nan)
    rows = (2 + (theta is not None) + (p is not None)) * k
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for i, offset in enumerate(offsets):
        span = slice(offset, offset + g0[i].numel())
        carried = times * q[:, span].double()
        factors = spread(state, k, metric, span)
        moved = factors * carried
        if theta is not None:
            # Rounding is part of the definition here: done as recenter_ does it, in q's dtype.
            here = theta[i].flatten()
            step = (times * q[:, span]).to(q.dtype) * spread(state, k, metric, span, q.dtype)
            there = (here.to(q.dtype) + step).to(here.dtype)
            moved = (there.to(q.dtype) - here.to(q.dtype)).double()
        y = g1[:, span].double() - g0[i].double().flatten() + weight_decay * moved
        if metric is not None:
            y = metric[span] * y / state_field(state, k, "displacement")[:, None]
            moved = torch.where(factors == 0, 0.0, moved / factors)
        w = y
        if p is not None:
            w = momentum * times * p[:, span].double() + y
            p_next[:, span] = w
        d[:, span] = carried + rate * w
        stack = [carried, y]
        stack += [moved] if theta is not None else []
        stack += [d[:, span]] if p is not None else []
        panel = torch.cat(stack)
        gram += panel @ panel.T
    return d, p_next, gram


def curvature_of_growth(exponent: float, rate: float, momentum: float, estimate: str) -> float:
    """Curvature h of a map with growth e^exponent a step; ``rate`` is negative for descent.

    NaN where it is not defined (a rate of 0) or too large for a float.
    """
    try:
        if estimate == "paper":
            heavy = exponent * exponent + exponent * (1 - momentum)
            return (heavy if momentum else exponent) / rate
        growth = math.exp(exponent)
        heavy = (growth - momentum) / growth if momentum else 1.0
        return math.expm1(exponent) / rate * heavy
    except (ZeroDivisionError, OverflowError):
        return float("nan")


def one_step_bar(rayleigh: float, residual: float, estimate: str, sign: int) -> tuple[float, float]:
    """The estimate of one step, at most r outwards of ρ, and the residual around it."""
    secant = math.hypot(rayleigh, residual)
    beyond = 0.0
    if estimate == "outer":
        gap = max(0.1 * secant, residual)
        beyond = sign * residual**2 / gap if gap else 0.0
    elif rayleigh and estimate == "schwarz":
        beyond = math.copysign(min(residual, residual**2 / abs(rayleigh)), rayleigh)
    elif rayleigh and estimate == "secant":
        beyond = math.copysign(residual**2 / (secant + abs(rayleigh)), rayleigh)
    return rayleigh + beyond, math.hypot(residual, beyond)


def expected_error(
    h: float,
    rayleigh: float,
    residual: float,
    first: float,
    *,
    refined: bool,
    estimate: str,
    sign: int,
) -> float:
    """What h is off by at most, nine times in ten."""
    name = estimate if estimate in ("schwarz", "secant", "outer") else "schwarz"
    best = one_step_bar(rayleigh, residual, name, sign)[0]
    secant = math.hypot(rayleigh, residual)
    share = residual / secant if secant else 0.0
    if name == "outer":
        return abs(h - best) + math.hypot(0.005 * best, residual)
    if name == "secant":
        part = math.hypot(0.01, 0.85 * first**1.2 if refined else 0.75 * first)
    else:
        left = 1.7 * (share + 0.05 * first) ** 1.2 if refined else 2.0 * share**1.2
        part = math.hypot(0.005, left)
    return abs(h - best) + abs(best) * part


def error_bar(
    rayleigh: float,
    residual: float,
    previous: float,
    previous_residual: float,
    *,
    estimate: str,
    sign: int,
    alternate: bool,
) -> tuple[float, float]:
    """Middle and half-length of the error bar, from this step's quotient and the last one's."""
    known = math.isfinite(previous)
    if estimate in ("schwarz", "secant", "outer"):
        center, width = one_step_bar(rayleigh, residual, estimate, sign)
        if known:
            before = one_step_bar(previous, previous_residual, estimate, sign)[0]
            width += abs(center - before) / 2
        return center, width
    apart = abs(rayleigh - previous) / 2 if known else 0.0
    if known and alternate:
        return (rayleigh + previous) / 2, (residual + previous_residual) / 2 + apart
    return rayleigh, residual + apart


def _unpack(state: Tensor, k: int) -> dict[str, Tensor]:
    return {name: state_field(state, k, name).clone() for name in state_fields(k)}


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
    displaced: Tensor | None = None,
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
    how = {"estimate": name, "sign": sign}
    bars = [
        error_bar(*numbers, **how, alternate=alternate)
        for numbers in zip(values.tolist(), residual.tolist(), *past, strict=True)
    ]
    s["center"], s["width"] = torch.tensor(bars, dtype=torch.float64).unbind(1)
    s["rayleigh"], s["residual"] = values, residual
    refined = bool(s["refined"])
    if not refined:
        lengths = torch.hypot(values, residual)
        s["first"] = torch.where(lengths > 0, residual / lengths, 0.0)

    beta = float(s["beta"])
    rate = sign * beta
    last = 2 + realised
    dd = block(last, last) if momentum else cc + rate * (cy + cy.T) + rate**2 * yy
    dd = v.T @ dd @ v
    vanished = (dd.diag() <= 1e-14 * before).tolist()
    factor = None if any(vanished) else _cholesky((dd + dd.T) / 2)
    met = factor is None
    h = s["center"].clone()
    # With β = 0 nothing was stepped: what would have grown at the next rate.
    first = beta == 0 and control and not met
    if first:
        s["beta"].fill_(_next_rate(s, values, residual, secant, sign, name, met))
        rate = sign * float(s["beta"])
    if not met:
        s["r"] = factor.T
        side = -1.0 if alternate else 1.0
        scaled = v * (side * float(s["perturbation"]))
        s["transform"] = torch.linalg.solve_triangular(s["r"], scaled, upper=True, left=False)
        if displaced is not None:
            found = s["perturbation"] / _forms(displaced, s["transform"]).sqrt()
            taken = found.isfinite() & (found > 0)
            s["displacement"] = torch.where(taken, found, s["displacement"])
        if beta != 0 or first:
            growth = 1 + 2 * rate * values + rate**2 * secant**2
            s["exponent"] = growth.log() / 2 if first else (s["r"].diag() / before.sqrt()).log()
            if name in ("growth", "paper"):
                for i in range(k):
                    found = curvature_of_growth(float(s["exponent"][i]), rate, momentum, name)
                    h[i] = found if math.isfinite(found) else h[i]
    spread = 0.0 if met else float(dd.diag().max() / s["r"].diag().square().min())
    s["pending"].fill_(float(not met))
    s["again"].fill_(float(spread > 1e6))
    s["h"] = h
    numbers = zip(*(x.tolist() for x in (h, values, residual, s["first"])), strict=True)
    errors = [expected_error(*row, refined=refined, **how) for row in numbers]
    s["error"] = torch.tensor(errors, dtype=torch.float64)
    s["h_ema"] = torch.where(s["h_ema"].isfinite(), ema * s["h_ema"] + (1 - ema) * h, h)
    if control and not first:
        s["beta"].fill_(_next_rate(s, values, residual, secant, sign, name, met))
    lost = k
    if met and not control:
        column = vanished.index(True) if any(vanished) else _lost((dd + dd.T) / 2)
        lost = int(v[:, column].abs().argmax())
    _ask_reseed(s, lost, k)
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


def recenter_(
    q: Tensor,
    d: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
    *,
    p: Tensor | None = None,
    p_next: Tensor | None = None,
    metric: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (q, copies, p); elements outside the segments stay in q and p, and are NaN in
    copies.
    """
    k = q.shape[0]
    transform, pending = (state_field(state, k, name) for name in ("transform", "pending"))
    take = bool(pending) if k > 1 else not bool(pending)
    # k = 1: the last step is taken back, as it lies.
    matrix = transform.T if k > 1 else torch.ones(1, 1, dtype=torch.float64)
    q, p = q.double().clone(), None if p is None else p.double().clone()
    copies = torch.full_like(q, math.nan)
    for here, offset in zip(theta, offsets, strict=True):
        span = slice(offset, offset + here.numel())
        if take:
            q[:, span] = matrix @ d[:, span].double()
        if take and p is not None:
            p[:, span] = matrix @ p_next[:, span].double()
        step = _multiple(state, k) * q[:, span] * spread(state, k, metric, span)
        copies[:, span] = here.double().flatten() + step
    return q, copies, p


def reseed_(
    panel: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    state: Tensor,
    *,
    elements: int,
    seed: int = 0,
) -> Tensor:
    """Returns the panel with the lost row replaced (in its own dtype)."""
    panel, k = panel.clone(), len(panel)
    s = {name: float(state_field(state, k, name)) for name in ("reseed", "steps", "skipped")}
    if not s["reseed"]:
        return panel
    row, norm = panel[int(s["reseed"]) - 1], float(state_field(state, k, "perturbation"))
    times = _multiple(state, k)
    if times and math.isfinite(norm / times):
        norm = abs(norm / times)
    size = norm / math.sqrt(7.0 / 12.0 * elements)
    step = np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:  # of uint64: products and sums wrap around
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    calls = np.array([int(s["steps"] + s["skipped"])], dtype=np.uint64)
    key = mix(np.array([seed], dtype=np.int64).astype(np.uint64) + step * calls)
    for offset, length in zip(offsets, sizes, strict=True):
        places = np.arange(offset + 1, offset + length + 1, dtype=np.uint64)
        bits = mix(key + step * places)
        magnitude = 0.5 + (bits >> np.uint64(12)) * 2.0**-53
        drawn = np.where(bits & np.uint64(1), -magnitude, magnitude) * size
        row[offset : offset + length] = torch.from_numpy(drawn)
    return panel


# --- the quasi-Newton step -----------------------------------------------------------------------


def _direction(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    advance: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """What a step goes along, and the next buffer; ``advance``: it is still to be made."""
    us, following = [], None if buffer is None else buffer.double().clone()
    for i, (t, g) in enumerate(zip(theta, gradient, strict=True)):
        u = g.double() + weight_decay * t.double()
        if following is not None:
            part = following[offsets[i] : offsets[i] + t.numel()].view(t.shape)
            if advance:
                part.copy_(momentum * part + u)
            u = u + momentum * part if nesterov else part.clone()
        us.append(u)
    return us, following


def _learning_rate(h: float, gain: float, max_lr: float) -> float:
    return gain / h if h * max_lr > 1 else gain * max_lr


def _rates(state: Tensor, k: int, gain: float, max_lr: float) -> list[float] | None:
    """Along the k vectors, and off them; None where there is no step."""
    fields = _unpack(state, k)
    h = fields["h_ema"].abs()
    if not float(fields["accepted"]) or not math.isfinite(gain) or not bool(h.isfinite().all()):
        return None
    rest = float(h[-1] + fields["residual"][-1])
    curvatures = [max(float(value), rest) for value in h]
    off = rest if float(fields["pending"]) else max(curvatures)
    return [_learning_rate(value, gain, max_lr) for value in [*curvatures, off]]


def slopes_(
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
    us, following = _direction(theta, gradient, buffer=buffer, offsets=offsets, **options)
    if float(state_field(state, k, "pending")):
        for u, offset in zip(us, offsets, strict=True):
            slopes += panel[:, offset : offset + u.numel()].double() @ u.flatten()
    return slopes, following


def descend_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    state: Tensor,
    *,
    gain: float = 1.0,
    max_lr: float = 10.0,
    buffer: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    factor: Tensor | None = None,
    panel: Tensor | None = None,
    slopes: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Returns (theta, rates, buffer)."""
    gain *= 1.0 if factor is None else float(factor)
    if panel is None:
        rates = _rate(state, gain, max_lr)
    else:
        rates = _rates(state, len(panel), gain, max_lr)
        rates = rates if bool(slopes.isfinite().all()) else None
    if rates is None:
        none = torch.zeros(() if panel is None else len(panel) + 1, dtype=torch.float64)
        stays = None if buffer is None else buffer.double()
        return [t.double() for t in theta], none, stays
    us, following = _direction(
        theta, gradient, buffer=buffer, offsets=offsets, advance=panel is None, **options
    )
    steps = [rates[-1] * u for u in us]
    if panel is not None and float(state_field(state, len(panel), "pending")):
        weights = _weights(state, rates, slopes)
        for step, offset in zip(steps, offsets, strict=True):
            rows = panel[:, offset : offset + step.numel()].double()
            step += (weights @ rows).view(step.shape)
    moved = [t.double() - step for t, step in zip(theta, steps, strict=True)]
    found = torch.tensor(rates, dtype=torch.float64)
    return moved, found[0] if panel is None else found, following


def _rate(state: Tensor, gain: float, max_lr: float) -> list[float] | None:
    """The one rate of a step without eigenvectors; None where there is no step."""
    h = float(state_field(state, 1, "h_ema"))
    if not float(state_field(state, 1, "accepted")) or not math.isfinite(h + gain):
        return None
    return [_learning_rate(h, gain, max_lr)]


def _weights(state: Tensor, rates: list[float], slopes: Tensor) -> Tensor:
    """What the rows of the panel are taken times in a step."""
    k = len(slopes)
    transform, size = state_field(state, k, "transform"), state_field(state, k, "perturbation")
    extra = torch.tensor([rate - rates[-1] for rate in rates[:-1]], dtype=torch.float64)
    return transform @ (extra * (transform.T @ slopes) / size**2)


# --- H·v by differences of gradients --------------------------------------------------------------


def displace_(
    v: Tensor, theta: Sequence[Tensor], offsets: Sequence[int], step: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Returns (copies, sums)."""
    copies, sums = [], torch.zeros(2, dtype=torch.float64)
    for here, offset in zip(theta, offsets, strict=True):
        wide = v[offset : offset + here.numel()].double().reshape(here.shape)
        copies.append(here.double() + float(step) * wide)
        # Rounding is part of the definition here: done as displace_ does it, in v's dtype.
        rounded = v[offset : offset + here.numel()].reshape(here.shape) * step.to(v.dtype)
        there = (here.to(v.dtype) + rounded).to(here.dtype)
        moved = (there.to(v.dtype) - here.to(v.dtype)).double()
        sums += torch.stack([(wide * moved).sum(), (wide * wide).sum()])
    return copies, sums


def difference_(
    out: Tensor,
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor,
    *,
    weight_decay: float = 0.0,
    v: Tensor | None = None,
) -> Tensor:
    """Returns out; elements outside the segments stay."""
    result = out.double().clone()
    for above, below, offset in zip(plus, minus, offsets, strict=True):
        span = slice(offset, offset + above.numel())
        value = float(scale) * (above.double() - below.double()).flatten()
        if weight_decay:
            value = value + weight_decay * v[span].double()
        result[span] = value
    return result


def directional_products(
    u: Tensor, g0: Sequence[Tensor], g1: Sequence[Tensor], offsets: Sequence[int]
) -> Tensor:
    """Returns (Σ u·g0, Σ u·(g1 − g0), Σ u²)."""
    sums = torch.zeros(3, dtype=torch.float64)
    for here, there, offset in zip(g0, g1, offsets, strict=True):
        wide = u[offset : offset + here.numel()].double()
        slope, change = here.double().flatten(), (there.double() - here.double()).flatten()
        sums += torch.stack([wide @ slope, wide @ change, wide @ wide])
    return sums


# --- panels as matrices --------------------------------------------------------------------------


def gram(
    a: Tensor, b: Tensor, *, gate: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Returns a·bᵀ, or zeros where the gate is closed."""
    if gate is not None and float(gate) == 0:
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
    times = 1.0 if weights is None else weights.double() ** 2
    return (a.double() * times) @ b.double().T


def combine_(out: Tensor, panel: Tensor, matrix: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """Returns out."""
    if gate is not None and float(gate) == 0:
        return out.double()
    return matrix.T @ panel.double()


def project_(w: Tensor, v: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (w, products)."""
    left = w.double() - coefficients @ v.double()
    return left, torch.cat([v.double() @ left, (left @ left)[None]])
