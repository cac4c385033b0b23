"""The vector work of one separation, against a copy and against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ops as cpu_bench
from gpu.timing import Bench, Call
from lyapcuda import ops

COPY_BYTES = cpu_bench.COPY_BYTES
JOBS = {"update": cpu_bench.UPDATE_BYTES, "step": cpu_bench.STEP_BYTES}


def sizes(bench: Bench) -> list[int]:
    """The most telling first: time may run out."""
    return [1003] if bench.rehearse else [10**8, 10**7]


def copy(bench: Bench) -> None:
    """torch's copy, and a product by 1: a kernel of torch's that moves as much."""
    for n in sizes(bench):
        calls: dict[str, list[Call]] = {"copy": [], "product": []}
        for _ in range(bench.sets(COPY_BYTES * n)):
            a, b = torch.randn(n, device=bench.device), torch.empty(n, device=bench.device)
            calls["copy"].append(lambda a=a, b=b: b.copy_(a))
            calls["product"].append(lambda a=a, b=b: torch.mul(a, 1.0, out=b))
        seconds, spread = bench.compare(calls)
        bench.row("copy", numel=n, bytes=COPY_BYTES * n, seconds=seconds, spread=spread)
        bench.release()


def data(bench: Bench, n: int) -> tuple[Tensor, ...]:
    """θ, g0, q, g1 and a d; they stay finite however often the jobs run."""
    theta, g0 = (torch.randn(n, device=bench.device) for _ in range(2))
    q = torch.randn(n, device=bench.device) * (cpu_bench.SIZE / n**0.5)
    return theta, g0, q, g0 + 1e-3 * q, torch.empty_like(q)


def our_jobs(
    bench: Bench, theta: Tensor, g0: Tensor, q: Tensor, g1: Tensor, d: Tensor
) -> dict[str, Call]:
    """The jobs of bench/ops.py."""
    state = ops.new_state(bench.device, perturbation=cpu_bench.SIZE, beta=0.5)
    losses = torch.zeros(2, dtype=torch.float64, device=bench.device)
    call = (d[None], q[None], [g0], g1[None], [0], state)
    step = cpu_bench.our_step(theta, q, g0, g1, state.clone(), losses)
    return {"update": lambda: ops.ascent_(*call), "step": step}


def against_torch(bench: Bench, n: int) -> None:
    """The two jobs of bench/ops.py, ours and in both eager forms."""
    calls: dict[str, dict[str, list[Call]]] = {job: {} for job in JOBS}
    for _ in range(bench.sets(n * 28)):
        theta, g0, q, g1, d = data(bench, n)
        tuned, moving = cpu_bench.Tuned(q), q.clone()
        ours = our_jobs(bench, theta, g0, q, g1, d)
        forms: dict[str, dict[str, Call]] = {
            "update": {
                "eager": lambda s=(q, g0, g1, 0.5): cpu_bench.eager_update(*s),
                "tuned": lambda t=tuned, s=(moving, g0, g1, 1e-6): t.update(*s),
            },
            "step": {
                "eager": lambda s=(theta, q, g0, g1, 0.5): cpu_bench.eager_step(*s),
                "tuned": lambda t=tuned, s=(theta, moving, g0, g1, 1e-6): t.step(*s),
            },
        }
        for job in JOBS:
            whole = {"copy": lambda d=d, q=q: d.copy_(q), "ours": ours[job]}
            for form, call in {**whole, **forms[job]}.items():
                calls[job].setdefault(form, []).append(call)
    for job, of_job in calls.items():
        seconds, spread = bench.compare(of_job)
        size = {"bytes": JOBS[job] * n, "copy_bytes": COPY_BYTES * n}
        bench.row("vector work", job=job, numel=n, **size, seconds=seconds, spread=spread)


def one_separation(
    bench: Bench, n: int, storage: torch.dtype
) -> tuple[dict[str, list[Call]], dict[str, float]]:
    """Each op in calls on several sets of data, and the bytes it has to move."""
    of = storage.itemsize
    size = {"ascent_": 8.0 + 2 * of, "ascent_, momentum": 16.0 + 2 * of, "recenter_": 4.0 + 2 * of}
    size |= {"ascent_, metric": 12.0 + 2 * of, "recenter_, metric": 8.0 + 2 * of}
    size |= {"descend_": 3.0 * of, "displace_": 4.0 + 2 * of, "difference_": 4.0 + 2 * of}
    size["directional_products"] = 4.0 + 2 * of
    if storage != torch.float32:
        size["ascent_, realised"] = 8.0 + 3 * of
    calls: dict[str, list[Call]] = {name: [] for name in ("copy", *size)}
    for _ in range(bench.sets(n * (24 + 4 * of))):
        for name, call in separation_calls(bench, n, storage).items():
            if name in calls:
                calls[name].append(call)
    return calls, {name: value * n for name, value in size.items()}


def separation_calls(bench: Bench, n: int, storage: torch.dtype) -> dict[str, Call]:
    """Each op on data of its own."""
    q, d, p, p_next = (torch.randn(1, n, device=bench.device) * 1e-3 for _ in range(4))
    metric = torch.rand(n, device=bench.device) + 0.5
    g0, theta = (torch.randn(n, device=bench.device).to(storage) for _ in range(2))
    copies = torch.empty(1, n, dtype=storage, device=bench.device)
    g1 = (g0 + 1e-2 * torch.randn_like(g0)).to(storage)[None]
    fields: dict[str, Any] = {"perturbation": 1e-2, "beta": 0.5, "h_ema": 1e3, "accepted": 1.0}
    state = ops.new_state(bench.device, **fields)
    small = torch.full((1,), 1e-3, dtype=torch.float64, device=bench.device)
    step: tuple[Any, ...] = (d, q, [g0], g1, [0], state)
    heavy = {"momentum": 0.9, "p": p, "p_next": p_next}
    return {
        "copy": lambda: d.copy_(q),
        "ascent_": lambda: ops.ascent_(*step),
        "ascent_, realised": lambda: ops.ascent_(*step, theta=[theta]),
        "ascent_, momentum": lambda: ops.ascent_(*step, **heavy),
        "ascent_, metric": lambda: ops.ascent_(*step, metric=metric),
        "recenter_": lambda: ops.recenter_(q, copies, d, [theta], [0], state),
        "recenter_, metric": lambda: ops.recenter_(
            *(q, copies, d, [theta], [0], state), metric=metric
        ),
        "descend_": lambda: ops.descend_([theta], [g0], state, max_lr=1e-9),
        "displace_": lambda: ops.displace_([copies[0]], q[0], [theta], [0], small),
        "difference_": lambda: ops.difference_(d[0], [g0], [g1[0]], [0], small),
        "directional_products": lambda: ops.directional_products(q[0], [g0], [g1[0]], [0]),
    }


def every_op(bench: Bench, n: int, storage: torch.dtype) -> None:
    """A row an op."""
    calls, size = one_separation(bench, n, storage)
    name_of = str(storage).removeprefix("torch.")
    for name, value in size.items():
        seconds, spread = bench.compare({"copy": calls["copy"], "ours": calls[name]}, most=0.1)
        about = {"op": name, "numel": n, "storage": name_of}
        moved = {"bytes": value, "copy_bytes": COPY_BYTES * n}
        bench.row("one separation", **about, **moved, seconds=seconds, spread=spread)


def vector_work(bench: Bench) -> None:
    """The jobs, then every op, in float32, then beside 16-bit parameters."""
    order: list[tuple[str, Callable[[], None], float, float]] = []
    for n in sizes(bench):
        order.append((f"jobs at N = {n:.0e}", lambda n=n: against_torch(bench, n), 5, 48.0 * n))
    for storage in (torch.float32, torch.bfloat16):
        for n in sizes(bench):
            label = f"ops beside {storage} at N = {n:.0e}"
            size = n * (24.0 + 4 * storage.itemsize) * 1.5
            order.append((label, lambda n=n, s=storage: every_op(bench, n, s), 4, size))
    for label, work, seconds, size in order:
        if bench.room(label, seconds, size):
            work()
        bench.release()
