"""Every op in every form, once, on a few small tensors: what compute-sanitizer looks at.

    compute-sanitizer --tool racecheck python bench/gpu_kernels.py

Sizes around those of blocks and vectors, aligned and not; more tensors than one launch takes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from lyapcuda import ops  # noqa: E402
from ops_support import DTYPES, Case, ascent_options, make_case, state_with  # noqa: E402


def on(device: str, case: Case, shift: int) -> Case:
    """The case there; every tensor starts ``shift`` elements off alignment."""

    def to(value):
        if isinstance(value, list):
            return [to(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        out = torch.empty(value.numel() + shift, dtype=value.dtype, device=device)[shift:]
        return out.copy_(value.flatten()).view(value.shape)

    moved = Case(*(to(value) for value in vars(case).values()))
    moved.state = case.state.to(device)
    return moved


def one_separation(device: str) -> int:
    count = 0
    losses = torch.ones(2, dtype=torch.float64, device=device)
    lists = [[1, 0, 33, 4097, (3, 5)], [100003], [k % 41 for k in range(70)]]
    for (buffer, storage), sizes, shift in itertools.product(DTYPES, lists, (0, 1)):
        case = on(device, make_case(sizes, buffer, storage, gap=16), shift)
        for realised, heavy in itertools.product((False, True), (False, True)):
            options = ascent_options(case, realised=realised, heavy=heavy)
            step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
            sums = ops.ascent_(*step, **options)
            count += 1
        ops.secant_(case.state, sums)
        for estimate in ops.ESTIMATES.values():
            ops.exponent_(case.state, sums, losses, estimate=estimate)
        for committed in (0.0, 1.0):
            state = state_with(case.state, committed=committed)
            ops.recenter_(case.theta1, case.q, case.p, case.theta, case.offsets, state)
        ops.descend_(case.theta, case.g0, case.state, weight_decay=0.1)
        ops.stream_copy_(case.d, case.q)
        again = state_with(case.state, reseed=1.0)
        lengths = [tensor.numel() for tensor in case.theta]
        ops.reseed_(case.q, case.offsets, lengths, again, elements=sum(lengths), p=case.p)
        count += 9
        count += products(case, losses)
    return count


def products(case: Case, losses: Tensor) -> int:
    step = torch.full((1,), 0.25, dtype=torch.float64, device=losses.device)
    lists = (case.theta, case.offsets)
    ops.displace_(case.theta1, case.q, *lists, step)
    for keep, decay in itertools.product((0.0, 0.5), (0.0, 0.1)):
        options = {"keep": keep, "weight_decay": decay, "v": case.p}
        ops.difference_(case.d, case.g0, case.g1, case.offsets, step, **options)
    return 5


def panels(device: str) -> int:
    from lyapcuda import panel_ops

    count = 0
    losses = torch.ones(2, dtype=torch.float64, device=device)
    sizes = [1, 0, 33, 1030, (3, 5), *(k % 13 for k in range(66))]
    for (buffer, storage), k, shift in itertools.product(DTYPES, (1, 3, 8, 17, 32), (0, 1)):
        case = on(device, make_case(sizes, buffer, storage, gap=16), shift)
        n = case.q.numel()

        def panel(rows=k, dtype=buffer, n=n, shift=shift):
            whole = torch.randn(rows * n + shift, device=device).to(dtype)
            return whole[shift:].view(rows, n)

        q, d, p, p_next = (panel() for _ in range(4))
        g1, copies = panel(dtype=storage), panel(dtype=storage)
        state = panel_ops.new_panel_state(device, k, perturbation=0.1, beta=0.3)
        transform, again = (panel_ops.panel_field(state, k, n) for n in ("transform", "again"))
        for realised, heavy in itertools.product((False, True), (False, True)):
            options = {"weight_decay": 0.1, "theta": case.theta if realised else None}
            if heavy:
                options |= {"momentum": 0.5, "p": p, "p_next": p_next}
            sums = panel_ops.panel_ascent_(d, q, case.g0, g1, case.offsets, state, **options)
            panel_ops.benettin_(*(state, sums, losses, k), realised=realised, momentum=0.5 * heavy)
            again.fill_(1.0)
            panel_ops.combine_(d, d, transform, gate=again)
            panel_ops.benettin_refine_(state, panel_ops.gram(d, d, gate=again), k)
            panel_ops.panel_recenter_(q, copies, d, case.theta, case.offsets, state)
            count += 6
        for kind in ({}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}):
            options = {"weight_decay": 0.1, "buffer": case.p if kind else None, **kind}
            step = (case.theta, case.g0, case.offsets, d, state)
            panel_ops.panel_field(state, k, "pending").fill_(1.0)
            slopes = panel_ops.panel_slopes_(*step, **options)
            panel_ops.panel_descend_(*step, slopes, **options)
            count += 2
        panel_ops.panel_field(state, k, "reseed").fill_(float(k))
        lengths = [tensor.numel() for tensor in case.theta]
        ops.reseed_(q, case.offsets, lengths, state, elements=sum(lengths), p=p)
        count += 1
    for rows, columns, dtype in itertools.product((1, 31, 128), (2, 40, 127), ops_dtypes()):
        a, b = (torch.randn(r, 1031, dtype=dtype, device=device) for r in (rows, columns))
        matrix = torch.randn(rows, columns, dtype=torch.float64, device=device)
        panel_ops.gram(a, b)
        panel_ops.gram(a, a)
        panel_ops.combine_(b, a, matrix)
        w = torch.randn(1031, dtype=dtype, device=device)
        panel_ops.project_(w, a, torch.randn(rows, dtype=torch.float64, device=device))
        panel_ops.project_(w, a[:0], matrix[:0, 0].contiguous())
        count += 5
    return count


def ops_dtypes() -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(buffer for buffer, _ in DTYPES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    device = "cpu" if parser.parse_args().rehearse else "cuda"
    count = one_separation(device)
    count += panels(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls on {device}")


if __name__ == "__main__":
    main()
