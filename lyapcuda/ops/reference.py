"""The fp64 oracle of every op: the same names and arguments, plain arithmetic in float64.

Slow and simple on purpose. Nothing is mutated: what an op writes is returned, in float64, before
any rounding to the buffers' dtypes. Tests hold every backend against these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda import _C
from lyapcuda.ops.flat import ESTIMATES, STATE_FIELDS, SUM_FIELDS

_INDEX = {name: i for i, name in enumerate(STATE_FIELDS)}


def ascent_(
    q: Tensor,
    g0: Sequence[Tensor],
    g1: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
    *,
    sign: int = 1,
    weight_decay: float = 0.0,
    theta: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns (d, p_next, sums); elements of q outside the segments are NaN in d and p_next."""
    scale, beta = (float(state[_INDEX[name]]) for name in ("scale", "beta"))
    d = torch.full_like(q, float("nan"), dtype=torch.float64)
    p_next = None if p is None else torch.full_like(d, float("nan"))
    sums = torch.zeros(len(SUM_FIELDS), dtype=torch.float64)
    for i, offset in enumerate(offsets):
        span = slice(offset, offset + g0[i].numel())
        carried = scale * q[span].double()
        moved = carried
        if theta is not None:
            # Rounding is part of the definition here: done as recenter_ does it, in q's dtype.
            here = theta[i].flatten()
            theta1 = (here.to(q.dtype) + (scale * q[span]).to(q.dtype)).to(here.dtype)
            moved = theta1.double() - here.double()
        y = g1[i].double().flatten() - g0[i].double().flatten() + weight_decay * moved
        w = y
        if p is not None:
            w = momentum * scale * p[span].double() + y
            p_next[span] = w
        d[span] = carried + sign * beta * w
        pairs = [(d[span], d[span]), (moved, moved), (moved, y), (y, y)]
        pairs += [(carried, moved), (carried, y)]
        sums += torch.stack([(a * b).sum() for a, b in pairs])
    return d, p_next, sums


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


def secant_(state: Tensor, sums: Tensor, *, sign: int = 1) -> Tensor:
    """Returns the state with β set from the secant."""
    s = dict(zip(STATE_FIELDS, state.tolist(), strict=True))
    v = dict(zip(SUM_FIELDS, sums.tolist(), strict=True))
    if _usable(v):
        _secant_rate(s, *_quotient(v), sign)
    return torch.tensor(list(s.values()), dtype=torch.float64)


def _usable(v: dict[str, float]) -> bool:
    return all(map(math.isfinite, v.values())) and v["qq"] > 0 and v["carried_q"] > 0


def _quotient(v: dict[str, float]) -> tuple[float, float, float]:
    """ρ, its residual, and the secant ‖y‖/‖q‖."""
    rayleigh = v["carried_y"] / v["carried_q"]
    variance = (v["yy"] - 2 * rayleigh * v["qy"] + rayleigh * rayleigh * v["qq"]) / v["qq"]
    return rayleigh, math.sqrt(max(variance, 0.0)), math.sqrt(v["yy"] / v["qq"])


def _secant_rate(
    s: dict[str, float], rayleigh: float, residual: float, secant: float, sign: int
) -> None:
    seen = secant if sign > 0 else abs(rayleigh) + residual
    if seen == 0 or not math.isfinite(seen) or not math.isfinite((math.e - 1) / seen):
        return
    s["bound"] = max(seen, (0.98 if sign > 0 else 1.0) * s["bound"])
    if sign * rayleigh < 0 and residual < abs(rayleigh):
        s["guard"] = max(s["guard"], secant)
    s["beta"] = min((math.e - 1) / max(s["bound"], s["guard"]), 1e38)  # what float32 holds


def schwarz_bar(rayleigh: float, residual: float) -> tuple[float, float]:
    """The Schwarz quotient ρ + r²/ρ, at most r away from ρ, and the residual around it."""
    if rayleigh == 0:
        return 0.0, residual
    beyond = min(residual, residual**2 / abs(rayleigh))
    return rayleigh + math.copysign(beyond, rayleigh), math.hypot(residual, beyond)


def error_bar(
    rayleigh: float,
    residual: float,
    previous: float,
    previous_residual: float,
    estimate: str,
    alternate: bool,
) -> tuple[float, float]:
    """Middle and half-length of the error bar, from this step's quotient and the last one's."""
    known = math.isfinite(previous)
    if estimate == "schwarz":
        center, width = schwarz_bar(rayleigh, residual)
        if known:
            width += abs(center - schwarz_bar(previous, previous_residual)[0]) / 2
        return center, width
    apart = abs(rayleigh - previous) / 2 if known else 0.0
    if known and alternate:
        return (rayleigh + previous) / 2, (residual + previous_residual) / 2 + apart
    return rayleigh, residual + apart


def exponent_(
    state: Tensor,
    sums: Tensor,
    losses: Tensor,
    *,
    sign: int = 1,
    estimate: int = 0,
    momentum: float = 0.0,
    control: bool = True,
    alternate: bool = True,
    ema: float = 0.0,
) -> Tensor:
    """Returns the state after the step."""
    s = dict(zip(STATE_FIELDS, state.tolist(), strict=True))
    v = dict(zip(SUM_FIELDS, sums.tolist(), strict=True))
    name = {number: key for key, number in ESTIMATES.items()}[estimate]
    s["reseed"] = 0.0
    if not (_usable(v) and all(map(math.isfinite, losses.flatten().tolist()))):
        s.update(accepted=0.0, committed=0.0, skipped=s["skipped"] + 1)
        if all(map(math.isfinite, [*v.values(), *losses.flatten().tolist()])):
            s.update(reseed=1.0, reseeds=s["reseeds"] + 1)
        return torch.tensor(list(s.values()), dtype=torch.float64)
    rayleigh, residual, secant = _quotient(v)
    h, width = error_bar(rayleigh, residual, s["rayleigh"], s["residual"], name, alternate)
    beta = s["beta"]
    s.update(center=h, width=width, rayleigh=rayleigh, residual=residual)
    if v["dd"] > 1e-14 * v["qq"]:
        lam = 0.5 * math.log(v["dd"] / v["qq"])
        if name in ("growth", "paper"):
            measured = curvature_of_growth(lam, sign * beta, momentum, name)
            h = measured if math.isfinite(measured) else h
        side = -1.0 if alternate else 1.0
        s.update(exponent=lam, scale=side * s["perturbation"] / math.sqrt(v["dd"]), committed=1.0)
        if control and name == "paper":
            s["beta"] = beta / lam if lam and abs(beta / lam) <= 1e38 else beta
        elif control:
            _secant_rate(s, rayleigh, residual, secant, sign)
    else:
        s["committed"] = 0.0
        s["beta"] = 0.5 * beta if control else beta
        if not control:
            s.update(reseed=1.0, reseeds=s["reseeds"] + 1)
    s["h"] = h
    s["h_ema"] = ema * s["h_ema"] + (1 - ema) * h if math.isfinite(s["h_ema"]) else h
    s.update(accepted=1.0, steps=s["steps"] + 1)
    return torch.tensor(list(s.values()), dtype=torch.float64)


def recenter_(
    q: Tensor,
    q_previous: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
    *,
    p: Tensor | None = None,
    p_previous: Tensor | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Returns (theta1, q, p)."""
    q, p = q.clone(), None if p is None else p.clone()
    if float(state[_INDEX["committed"]]) == 0:
        for t, offset in zip(theta, offsets, strict=True):
            span = slice(offset, offset + t.numel())
            q[span] = q_previous[span]
            if p is not None:
                p[span] = p_previous[span]
    scale = float(state[_INDEX["scale"]])
    theta1 = [
        t.double() + scale * q[offset : offset + t.numel()].double().reshape(t.shape)
        for t, offset in zip(theta, offsets, strict=True)
    ]
    return theta1, q, p


def reseed_(
    panel: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    state: Tensor,
    *,
    elements: int,
    seed: int = 0,
) -> Tensor:
    """Returns the panel, or flat buffer, with the lost row replaced (in its own dtype)."""
    panel = panel.clone()
    fields = _C.panel_fields(len(panel)) if panel.dim() == 2 else None
    places = fields and {name: offset for name, (offset, _) in fields.items()}
    s = {n: float(state[i]) for n, i in (places or _INDEX).items()}
    if not s["reseed"]:
        return panel
    row = panel[int(s["reseed"]) - 1] if panel.dim() == 2 else panel
    norm = s["perturbation"]
    if panel.dim() == 1 and s["scale"] and math.isfinite(norm / s["scale"]):
        norm = abs(norm / s["scale"])
    size = norm / math.sqrt(7.0 / 12.0 * elements)
    whole, step = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & whole
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & whole
        return x ^ (x >> 31)

    key = mix((seed + step * int(s["steps"] + s["skipped"])) & whole)
    for offset, size_of in zip(offsets, sizes, strict=True):
        for place in range(offset, offset + size_of):
            bits = mix((key + step * (place + 1)) & whole)
            magnitude = 0.5 + (bits >> 12) * 2.0**-53
            row[place] = (-magnitude if bits & 1 else magnitude) * size
    return panel


def direction(
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


def learning_rate(h: float, gain: float, max_lr: float) -> float:
    return gain / h if h * max_lr > 1 else gain * max_lr


def descend_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    state: Tensor,
    *,
    gain: float = 1.0,
    max_lr: float = 10.0,
    factor: Tensor | None = None,
    buffer: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Returns (theta, lr, buffer)."""
    h = float(state[_INDEX["h_ema"]])
    times = 1.0 if factor is None else float(factor)
    if float(state[_INDEX["accepted"]]) == 0 or not math.isfinite(h + times):
        stays = None if buffer is None else buffer.double()
        return [t.double() for t in theta], torch.zeros((), dtype=torch.float64), stays
    lr = learning_rate(h, gain * times, max_lr)
    us, following = direction(theta, gradient, buffer=buffer, **options)
    moved = [t.double() - lr * u for t, u in zip(theta, us, strict=True)]
    return moved, torch.tensor(lr, dtype=torch.float64), following


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
    keep: float = 0.0,
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
        if keep:
            value = value + keep * out[span].double()
        result[span] = value
    return result


def stream_copy_(source: Tensor) -> Tensor:
    """Returns the copy."""
    return source.clone()
