"""Ours against torch.compile, which takes longer to compile than all of it takes to measure."""

from __future__ import annotations

import torch

import ops as cpu_bench
from gpu import panels, vectors
from gpu.timing import Bench

#: Ops over panels where it takes part, the dearest first.
PANEL_OPS = {"ascent_": "ascent", "recenter_": "recenter"}


def vector_jobs(bench: Bench, n: int) -> None:
    """The two jobs of bench/ops.py."""
    theta, g0, q, g1, d = vectors.data(bench, n)
    ours = vectors.our_jobs(bench, theta, g0, q, g1, d)
    functions = {"update": cpu_bench.eager_update, "step": cpu_bench.eager_step}
    arguments = {"update": (q, g0, g1, 0.5), "step": (theta, q, g0, g1, 0.5)}
    for job, function in functions.items():
        if not bench.room(f"{job} by torch.compile", 8, 24.0 * n):
            continue
        compiled = bench.compile(function)
        forms = {"ours": [ours[job]], "compiled": [lambda c=compiled, j=job: c(*arguments[j])]}
        seconds, spread = bench.compare(forms)
        bench.row("compiled", job=job, k=1, numel=n, seconds=seconds, spread=spread)


def panel_jobs(bench: Bench, n: int, k: int) -> None:
    """The ops over panels that move most."""
    functions = {name: bench.compile(panels.EAGER[name]) for name in PANEL_OPS.values()}
    jobs = panels.panel_jobs(bench, n, k, functions)
    for name in PANEL_OPS:
        if not bench.room(f"{name}, k = {k}, by torch.compile", 8, 0):
            continue
        forms = {"ours": [jobs[name].ours], "compiled": [jobs[name].eager]}
        seconds, spread = bench.compare(forms, most=0.05)
        bench.row("compiled", job=name, k=k, numel=n, seconds=seconds, spread=spread)


def compiled(bench: Bench) -> None:
    """A row a job."""
    n = panels.length(bench)
    vector_jobs(bench, n)
    for k in panels.counts(bench):
        torch._dynamo.reset()
        bench.release()
        if bench.room(f"k = {k} by torch.compile", 8, 4.0 * n * (9 * k + 8)):
            panel_jobs(bench, n, k)
