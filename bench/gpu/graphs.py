"""Two steps one by one, and as a CUDA graph: what launching costs."""

from __future__ import annotations

import torch

from gpu.timing import Bench, Call
from lyapcuda import ops

SHAPES = ((10**5, 60), (10**6, 60), (10**7, 60), (10**5, 1))


def two_steps(bench: Bench, n: int, tensors: int) -> Call:
    """As a tracker takes them: q and d change places."""
    length = n // tensors
    offsets = [i * length for i in range(tensors)]
    q = torch.randn(1, n, device=bench.device) * 1e-3
    d, copies = torch.empty_like(q), torch.empty_like(q)
    theta, g0 = ([torch.randn(length, device=bench.device) for _ in offsets] for _ in "tg")
    g1 = 1e-3 * torch.randn_like(q)
    g1[0, : length * tensors] += torch.cat(g0)
    state = ops.new_state(bench.device, perturbation=1e-2, beta=0.5)
    losses = torch.zeros(2, dtype=torch.float64, device=bench.device)

    def steps() -> None:
        for here, there in ((q, d), (d, q)):
            gram = ops.ascent_(there, here, g0, g1, offsets, state)
            ops.benettin_(state, gram, losses, 1, control=False)
            ops.recenter_(there, copies, here, theta, offsets, state)

    return steps


def captured(bench: Bench, steps: Call) -> Call:
    """Replays the steps as a graph; in a rehearsal the steps themselves."""
    if bench.rehearse:
        return steps
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps()  # what is loaded at a first call mustn't be within the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    return graph.replay


def graphs(bench: Bench) -> None:
    """A row a shape. Timed without a head start: the launches are what it is about."""
    for n, tensors in SHAPES:
        n = 600 if bench.rehearse else n
        if not bench.room(f"graphs at N = {n:.0e}", 1, 0):
            continue
        steps = two_steps(bench, n, tensors)
        forms = {"eager": steps, "graph": captured(bench, steps)}
        # Many between two clock readings.
        calls = {name: [lambda c=call: [c() for _ in range(20)]] for name, call in forms.items()}
        totals, spread = bench.compare(calls, most=0.2, queue=1)
        seconds = {name: total / 20 for name, total in totals.items()}
        bench.row("graphs", numel=n, tensors=tensors, seconds=seconds, spread=spread)
