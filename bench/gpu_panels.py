"""The ops over several separations and Krylov vectors, against PyTorch: for gpu_sections.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_timing import Bench, gb
from lyapcuda import ops

Call = Callable[[], object]
COLUMNS = ("eager", "tuned eager", "torch.compile")
#: (N, k) where torch.compile takes part: compiling takes longer than all the measuring.
COMPILED = {(10**8, 1), (10**8, 4), (10**8, 14), (1003, 2)}


@dataclass
class Job:
    """What an op has to move and to multiply, and itself beside three ways to write it in torch."""

    bytes: float
    products: float  # of doubles, summed
    ours: Call
    eager: Call
    tuned: Call
    compiled: Call


# --- as one would write it down ------------------------------------------------------------------


def eager_ascent(q, g0, g1, beta):
    y = g1 - g0
    stack = torch.cat([q, y])
    return q + beta * y, stack @ stack.T


def eager_recenter(d, theta, transform):
    q = transform.T @ d
    return q, theta + q


def eager_project(w, v, c):
    w = w - c @ v
    return w, v @ w, w @ w


def eager_displace(v, theta, step):
    copies = theta + step * v
    return copies, (v * (copies - theta)).sum(), (v * v).sum()


def eager_difference(plus, minus, scale):
    return scale * (plus - minus)


def eager_descend(theta, g, d, rates, rest):
    return theta - (rest * g + ((rates - rest) * (d @ g)) @ d)


class Tuned:
    """In place, into buffers made once. Sums in float32, as the others have; ours are float64."""

    def __init__(self, panel) -> None:
        k = len(panel)
        self.y, self.d, self.copies = (torch.empty_like(panel) for _ in range(3))
        self.one = torch.empty_like(panel[0])
        self.small = [panel.new_empty(k, k) for _ in range(3)]

    def ascent(self, q, g0, g1, beta):
        torch.sub(g1, g0, out=self.y)
        torch.add(q, self.y, alpha=beta, out=self.d)
        pairs = [(q, q), (q, self.y), (self.y, self.y)]
        return [torch.mm(a, b.T, out=o) for (a, b), o in zip(pairs, self.small, strict=True)]

    def gram(self, a):
        return torch.mm(a, a.T, out=self.small[0])

    def combine(self, panel, matrix):
        return torch.mm(matrix.T, panel, out=self.d)

    def recenter(self, d, theta, transform):
        torch.mm(transform.T, d, out=self.y)
        return torch.add(theta, self.y, out=self.copies)

    def descend(self, theta, g, d, rates, rest):
        slopes = torch.mv(d, g)
        torch.mv(d.T, slopes.mul_(rates - rest), out=self.one)
        return theta.sub_(self.one).sub_(g, alpha=rest)

    def project(self, w, v, c):
        torch.addmv(w, v.T, c, alpha=-1.0, out=w)
        return torch.mv(v, w), torch.dot(w, w)

    def displace(self, v, theta, step):
        torch.add(theta, v, alpha=step, out=self.one)
        moved = torch.sub(self.one, theta, out=self.d[0])
        return torch.dot(v, moved), torch.dot(v, v)

    def difference(self, plus, minus, scale):
        return torch.sub(plus, minus, out=self.one).mul_(scale)


# --- the jobs ------------------------------------------------------------------------------------


def jobs(bench: Bench, n: int, k: int, compiled: dict[str, Any]) -> dict[str, Job]:
    """Every op on one set of data; the panels are large enough to be out of any cache."""
    from lyapcuda import panel_ops

    def normal(*shape, scale=1.0):
        return torch.randn(shape, device=bench.device) * scale

    def scalar(value):
        return torch.full((1,), value, dtype=torch.float64, device=bench.device)

    q, g1, d = (normal(k, n, scale=1e-3) for _ in range(3))
    g0, theta, w = normal(n), normal(n), normal(n)
    state = panel_ops.new_panel_state(bench.device, k, perturbation=1e-2, beta=0.5, pending=1.0)
    turn = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64))[0].to(bench.device)
    panel_ops.panel_field(state, k, "transform").copy_(turn)
    matrix, small = turn.contiguous(), turn.float()
    c64 = torch.full((k,), 1e-6, dtype=torch.float64, device=bench.device)
    c = c64.float()
    step, scale = scalar(1e-3), scalar(1.0)
    t, four = Tuned(q), 4.0 * n
    # The steps of LyapunovSGD with k curvatures: so short that θ stays finite, however often.
    rates, rest = torch.full((k,), 1e-9, device=bench.device), 2e-10

    def descend() -> None:
        call = ([theta], [g0], [0], d, state)
        panel_ops.panel_descend_(*call, panel_ops.panel_slopes_(*call), gain=1e-9)

    def job(size, products, ours, name, *arguments):
        eager = (
            globals().get(f"eager_{name}")
            or {
                "gram": lambda a: a @ a.T,
                "combine": lambda panel, matrix: matrix.T @ panel,
            }[name]
        )
        if name not in compiled:
            compiled[name] = bench.compile(eager)
        return Job(
            size * four,
            products * n,
            ours,
            lambda: eager(*arguments),
            lambda: getattr(t, name)(*arguments),
            lambda: compiled[name](*arguments),
        )

    def copied() -> None:
        ops.stream_copy_(g1.view(-1), d.view(-1))

    found = {
        "copy": Job(8.0 * k * n, 0, copied, copied, copied, copied),
        "panel_ascent_": job(
            3 * k + 1,
            k * (2 * k + 1),
            lambda: panel_ops.panel_ascent_(d, q, [g0], g1, [0], state),
            *("ascent", q, g0, g1, 0.5),
        ),
        "panel_recenter_": job(
            3 * k + 1,
            0,
            lambda: panel_ops.panel_recenter_(q, g1, d, [theta], [0], state),
            *("recenter", d, theta, small),
        ),
        "gram": job(k, k * (k + 1) / 2, lambda: panel_ops.gram(d, d), "gram", d),
        "combine_": job(2 * k, 0, lambda: panel_ops.combine_(g1, d, matrix), "combine", d, small),
        "panel_slopes_, panel_descend_": job(
            2 * k + 4, 2 * k, descend, *("descend", theta, g0, d, rates, rest)
        ),
        "project_": job(k + 2, k + 1, lambda: panel_ops.project_(w, d, c64), "project", w, d, c),
    }
    if k == 1:
        v, out = d[0], g1[0]
        found["displace_"] = job(
            3, 2, lambda: ops.displace_([w], v, [theta], [0], step), "displace", v, theta, 1e-3
        )
        found["difference_"] = job(
            3, 0, lambda: ops.difference_(out, [g0], [theta], [0], scale), "difference", g0, theta,
            1.0,
        )  # fmt: skip
    return found


def benettin(bench: Bench) -> None:
    """The scalar work of a step with k separations: one block."""
    from lyapcuda import panel_ops

    bench.lines += [""]
    bench.head("benettin_, k", "µs")
    losses = torch.zeros(2, dtype=torch.float64, device=bench.device)
    for k in (1, 4, 14, 32):
        state = panel_ops.new_panel_state(bench.device, k, perturbation=1e-2, beta=0.5)
        rows = torch.randn(2 * k, 40 * k, dtype=torch.float64, device=bench.device)
        rows[k:] = rows[:k] * 2 + 0.1 * rows[k:]
        gram = rows @ rows.T
        calls = [lambda s=state, g=gram, k=k: panel_ops.benettin_(s, g, losses, k, control=False)]
        seconds, spread = bench.compare({"benettin_": calls}, most=0.1)
        bench.row(
            [str(k), f"{seconds['benettin_'] * 1e6:.1f}"], k=k, seconds=seconds, spread=spread
        )


def panels(bench: Bench) -> None:
    try:
        from lyapcuda import panel_ops  # noqa: F401
    except ImportError:
        bench.note("this version has no ops over panels")
        return
    benettin(bench)
    bench.lines += [""]
    bench.head("op", "k", "N", "µs", "GB/s", "of copy", "Gproducts/s", *COLUMNS)
    counts = (1, 2) if bench.rehearse else (1, 4, 14, 32)
    lengths = (1003,) if bench.rehearse else (10**8, 10**7, 10**9, 10**6)
    for n in lengths:
        for k in counts:
            label = f"k = {k}, N = {n:.0e}"
            if 4.0 * n * (10 * k + 8) > bench.free():
                bench.note(f"{label}: left out, no memory")
                continue
            if bench.left() < 5 and not bench.rehearse:
                bench.note(f"{label}: left out, no time")
                continue
            one(bench, n, k)
            gc.collect()
            bench.release()
    bench.lines += ["", "The last three columns: their time over ours; their sums are float32."]


def one(bench: Bench, n: int, k: int) -> None:
    torch._dynamo.reset()
    sets: list[dict[str, Job]] = []
    compiled: dict[str, Any] = {}
    for _ in range(bench.sets(4.0 * n * 3 * k)):
        sets.append(jobs(bench, n, k, compiled))
    whole = [(data["copy"].ours, data["copy"].bytes) for data in sets]
    copy = gb(whole[0][1], bench.seconds([call for call, _ in whole], 0.05))
    forms_of_torch = ["eager", "tuned"] + (["compiled"] if (n, k) in COMPILED else [])
    for name, job in sets[0].items():
        if name == "copy":
            continue
        if bench.left() < 2 and not bench.rehearse:
            bench.note(f"{name}, k = {k}, N = {n:.0e}: left out, no time")
            continue
        forms = {
            form: [getattr(data[name], form) for data in sets] for form in ("ours", *forms_of_torch)
        }
        seconds, spread = bench.compare(forms, most=0.04)
        ours = seconds.get("ours")
        if ours is None:  # there is a note
            continue
        rate = gb(job.bytes, ours)
        others = [seconds.get(form) for form in ("eager", "tuned", "compiled")]
        bench.row(
            [name, str(k), f"{n:.0e}", f"{ours * 1e6:.1f}", f"{rate:.0f}", f"{rate / copy:.0%}"]
            + [f"{job.products / ours / 1e9:.0f}" if job.products else "-"]
            + ["-" if other is None else f"{other / ours:.1f}×" for other in others],
            op=name,
            k=k,
            numel=n,
            bytes=job.bytes,
            products=job.products,
            seconds=seconds,
            spread=spread,
        )
