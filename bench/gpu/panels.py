"""k separations: a step against eager Gram-Schmidt, and the ops over panels against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.timing import Bench, Call
from lyapcuda import ops

#: Of q and of θ + q − θ.
SIZE = 1e-2


def counts(bench: Bench) -> tuple[int, ...]:
    return (2,) if bench.rehearse else (14, 5, 2)


def length(bench: Bench) -> int:
    return 1003 if bench.rehearse else 10**8


# --- a whole step --------------------------------------------------------------------------------


def eager_step(q: Tensor, g0: Tensor, g1: Tensor, theta: Tensor, beta: float):
    """As one would write it down: modified Gram-Schmidt, vector by vector."""
    rows: list[Tensor] = []
    for v in q + beta * (g1 - g0):
        for u in rows:
            v = v - (u @ v) * u
        rows.append(v / v.norm())
    q = torch.stack(rows) * SIZE
    return q, theta + q


def whole_step(bench: Bench, n: int, k: int) -> None:
    """Ascent, orthonormalisation and re-centring of k separations."""
    q = torch.randn(k, n, device=bench.device) * (SIZE / n**0.5)
    d, copies = torch.empty_like(q), torch.empty_like(q)
    theta, g0 = torch.randn(n, device=bench.device), torch.randn(n, device=bench.device) * 1e-6
    # y of each its own: d stays as well conditioned as q.
    g1 = torch.randn_like(q).mul_(SIZE / n**0.5).add_(g0)
    state = ops.new_state(bench.device, k, perturbation=SIZE, beta=0.1)
    losses = torch.zeros(2, dtype=torch.float64, device=bench.device)
    field = {
        name: ops.state_field(state, k, name)
        for name in ("again", "pending", "transform", "skipped", "rayleigh")
    }

    def ours() -> None:  # as lyapcuda.dynamics.benettin does it
        ops.recenter_(q, copies, d, [theta], [0], state)
        field["pending"].zero_()
        gram = ops.ascent_(d, q, [g0], g1, [0], state)
        ops.benettin_(state, gram, losses, k, control=False)
        ops.combine_(d, d, field["transform"], gate=field["again"])
        second = ops.gram(d, d, gate=field["again"])
        ops.benettin_refine_(state, second, k)

    ours()
    fixed = q.clone()
    forms: dict[str, list[Call]] = {
        "copy": [lambda: copies.copy_(d)],
        "ours": [ours],
        "gram schmidt": [lambda: eager_step(fixed, g0, g1, theta, 0.1)],
    }
    seconds, spread = bench.compare(forms, most=0.3, queue=4)
    if float(field["skipped"]) or not bool(field["rayleigh"].isfinite().all()):
        raise RuntimeError(f"k = {k}: the steps measured nothing")
    bench.row(
        "panel step",
        k=k,
        numel=n,
        bytes=(24.0 * k + 8) * n,
        copy_bytes=8.0 * k * n,
        seconds=seconds,
        spread=spread,
        second_pass=bool(field["again"]),
    )


# --- op by op ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PanelJob:
    """What an op has to move and to multiply, and its forms."""

    bytes: float
    #: Of doubles, summed.
    products: float
    ours: Call
    eager: Call
    tuned: Call | None = None


def eager_ascent(q: Tensor, g0: Tensor, g1: Tensor, beta: float):
    y = g1 - g0
    stack = torch.cat([q, y])
    return q + beta * y, stack @ stack.T


def eager_recenter(d: Tensor, theta: Tensor, transform: Tensor):
    q = transform.T @ d
    return q, theta + q


def eager_gram(a: Tensor):
    return a @ a.T


def eager_combine(panel: Tensor, matrix: Tensor):
    return matrix.T @ panel


def eager_project(w: Tensor, v: Tensor, c: Tensor):
    w = w - c @ v
    return w, v @ w, w @ w


def eager_descend(theta: Tensor, g: Tensor, d: Tensor, rates: Tensor, rest: float):
    return theta - (rest * g + ((rates - rest) * (d @ g)) @ d)


class Tuned:
    """In place, into buffers made once. Sums in float32, as the others have; ours are float64."""

    def __init__(self, panel: Tensor) -> None:
        k = len(panel)
        self.y, self.d = torch.empty_like(panel), torch.empty_like(panel)
        self.one = torch.empty_like(panel[0])
        self.small = [panel.new_empty(k, k) for _ in range(3)]

    def ascent(self, q: Tensor, g0: Tensor, g1: Tensor, beta: float):
        torch.sub(g1, g0, out=self.y)
        torch.add(q, self.y, alpha=beta, out=self.d)
        pairs = [(q, q), (q, self.y), (self.y, self.y)]
        return [torch.mm(a, b.T, out=o) for (a, b), o in zip(pairs, self.small, strict=True)]

    def gram(self, a: Tensor):
        return torch.mm(a, a.T, out=self.small[0])

    def combine(self, panel: Tensor, matrix: Tensor):
        return torch.mm(matrix.T, panel, out=self.d)

    def recenter(self, d: Tensor, theta: Tensor, transform: Tensor):
        torch.mm(transform.T, d, out=self.y)
        return torch.add(theta, self.y, out=self.d)

    def descend(self, theta: Tensor, g: Tensor, d: Tensor, rates: Tensor, rest: float):
        slopes = torch.mv(d, g)
        torch.mv(d.T, slopes.mul_(rates - rest), out=self.one)
        return theta.sub_(self.one).sub_(g, alpha=rest)

    def project(self, w: Tensor, v: Tensor, c: Tensor):
        torch.addmv(w, v.T, c, alpha=-1.0, out=w)
        return torch.mv(v, w), torch.dot(w, w)


EAGER = {
    "ascent": eager_ascent,
    "recenter": eager_recenter,
    "gram": eager_gram,
    "combine": eager_combine,
    "project": eager_project,
    "descend": eager_descend,
}


def panel_jobs(bench: Bench, n: int, k: int, forms: dict[str, Any]) -> dict[str, PanelJob]:
    """Every op on one set of data, beside torch's ``forms``: functions by the names of `EAGER`."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=bench.device).mul_(scale)

    q, g1, d = (normal(k, n, scale=1e-3) for _ in range(3))
    g0, theta, w = normal(n), normal(n), normal(n)
    # As after a step that counts: nothing is left out.
    fields = {"beta": 0.5, "pending": 1.0, "accepted": 1.0, "h_ema": 1e3, "residual": 1.0}
    state = ops.new_state(bench.device, k, perturbation=SIZE, **fields)
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0].to(bench.device).contiguous()
    ops.state_field(state, k, "transform").copy_(turn)
    small = turn.float()
    c = torch.full((k,), 1e-6, dtype=torch.float64, device=bench.device)
    tuned, floats = Tuned(q), 4.0 * n
    # The steps of LyapunovSGD with k curvatures: so short that θ stays finite, however often.
    rates, rest = torch.full((k,), 1e-9, device=bench.device), 2e-10

    def descend() -> None:
        slopes = ops.slopes_([theta], [g0], [0], d, state)
        along = {"offsets": [0], "panel": d, "slopes": slopes}
        ops.descend_([theta], [g0], state, gain=1e-9, **along)

    def job(size: float, products: float, ours: Call, name: str, *arguments: Any) -> PanelJob:
        return PanelJob(
            size * floats,
            products * n,
            ours,
            lambda: forms[name](*arguments),
            lambda: getattr(tuned, name)(*arguments),
        )

    def copied() -> None:
        g1.copy_(d)

    return {
        "copy": PanelJob(8.0 * k * n, 0, copied, copied),
        "ascent_": job(
            3 * k + 1,
            k * (2 * k + 1),
            lambda: ops.ascent_(d, q, [g0], g1, [0], state),
            *("ascent", q, g0, g1, 0.5),
        ),
        "recenter_": job(
            3 * k + 1,
            0,
            lambda: ops.recenter_(q, g1, d, [theta], [0], state),
            *("recenter", d, theta, small),
        ),
        "gram": job(k, k * (k + 1) / 2, lambda: ops.gram(d, d), "gram", d),
        "combine_": job(2 * k, 0, lambda: ops.combine_(g1, d, turn), "combine", d, small),
        "slopes_, descend_": job(
            2 * k + 4, 2 * k, descend, *("descend", theta, g0, d, rates, rest)
        ),
        "project_": job(
            *(k + 2, k + 1, lambda: ops.project_(w, d, c)),
            *("project", w, d, c.float()),
        ),
    }


def op_by_op(bench: Bench, n: int, k: int) -> None:
    """A row an op."""
    sets = [panel_jobs(bench, n, k, EAGER) for _ in range(bench.sets(4.0 * n * 3 * k))]
    for name, job in sets[0].items():
        if name == "copy" or not bench.room(f"{name}, k = {k}", 3, 0):
            continue
        forms = {"copy": [data["copy"].ours for data in sets]}
        forms |= {
            form: [getattr(data[name], form) for data in sets]
            for form in ("ours", "eager", "tuned")
        }
        seconds, spread = bench.compare(forms, most=0.05)
        bench.row(
            "panels",
            op=name,
            k=k,
            numel=n,
            bytes=job.bytes,
            copy_bytes=sets[0]["copy"].bytes,
            products=job.products,
            seconds=seconds,
            spread=spread,
        )
        bench.release()


def scalars(bench: Bench) -> None:
    """benettin_: one block."""
    losses = torch.zeros(2, dtype=torch.float64, device=bench.device)
    for k in (*counts(bench), 1):
        state = ops.new_state(bench.device, k, perturbation=SIZE, beta=0.5)
        rows = torch.randn(2 * k, 40 * k, dtype=torch.float64, device=bench.device)
        rows[k:] = rows[:k] * 2 + 0.1 * rows[k:]
        gram = rows @ rows.T
        calls = [lambda s=state, g=gram, k=k: ops.benettin_(s, g, losses, k, control=False)]
        seconds, spread = bench.compare({"ours": calls}, most=0.1)
        bench.row("benettin_", k=k, seconds=seconds, spread=spread)


def panels(bench: Bench) -> None:
    """Whole steps first, then the ops."""
    n = length(bench)
    for k in counts(bench):
        if bench.room(f"step, k = {k}", 5, 4.0 * n * (10 * k + 4)):
            whole_step(bench, n, k)
        bench.release()
    scalars(bench)
    for k in counts(bench):
        if bench.room(f"ops, k = {k}", 5, 4.0 * n * (9 * k + 8)):
            op_by_op(bench, n, k)
        bench.release()
