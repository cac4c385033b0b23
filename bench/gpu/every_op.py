"""Every op in every form, once, on a few small tensors: what compute-sanitizer looks at.

    compute-sanitizer --tool racecheck python -m gpu.every_op PART      # parts: gpu.stages.PARTS

Sizes around those of blocks and vectors, aligned and not; more tensors than one launch takes. A
line says how many calls of a kind were made, so that a run that is cut off tells how far it came.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpu.lines import Lines
from gpu.processes import ROOT

sys.path.insert(0, str(ROOT / "tests" / "support"))
from lyapcuda import ops  # noqa: E402
from ops_cases import DTYPES, Case, ascent_options, make_case, state_with  # noqa: E402
from simt_library import SEGMENTS  # noqa: E402

#: Blocks take several tiles of these, the next one on its way meanwhile.
LONG = [700003, 33]
#: Calls, and of what.
Counted = Iterator[tuple[int, str]]


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


def one_separation(device: str, dtypes: Sequence, shifts: Sequence[int]) -> Counted:
    losses = torch.ones(2, dtype=torch.float64, device=device)
    step = torch.full((1,), 0.25, dtype=torch.float64, device=device)
    lists = [[1, 0, 33, 4097, (3, 5)], [k % 41 for k in range(SEGMENTS + 6)], [100003]]
    for (buffer, storage), sizes, shift in itertools.product(dtypes, lists, shifts):
        count, case = 0, on(device, make_case(sizes, buffer, storage, gap=16), shift)
        for realised, heavy in itertools.product((False, True), (False, True)):
            options = ascent_options(case, realised=realised, heavy=heavy)
            taken = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
            sums = ops.ascent_(*taken, **options)
            count += 1
        ops.secant_(case.state, sums)
        for estimate in ops.ESTIMATES.values():
            ops.exponent_(case.state, sums, losses, estimate=estimate)
            count += 1
        for committed in (0.0, 1.0):
            state = state_with(case.state, committed=committed)
            for beside in ({}, {"p": case.d, "p_previous": case.p_next}):
                taken = (case.theta1, case.q, case.p, case.theta, case.offsets, state)
                ops.recenter_(*taken, **beside)
        for kind in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
            beside = {"buffer": case.p, "offsets": case.offsets} if kind else {}
            state = state_with(case.state, accepted=1.0, h_ema=2.0)
            ops.descend_(case.theta, case.g0, state, weight_decay=0.1, **kind, **beside)
        ops.stream_copy_(case.d, case.q)
        ops.displace_(case.theta1, case.q, case.theta, case.offsets, step)
        for keep, decay in itertools.product((0.0, 0.5), (0.0, 0.1)):
            options = {"keep": keep, "weight_decay": decay, "v": case.p}
            ops.difference_(case.d, case.g0, case.g1, case.offsets, step, **options)
        again = state_with(case.state, reseed=1.0)
        lengths = [tensor.numel() for tensor in case.theta]
        ops.reseed_(case.q, case.offsets, lengths, again, elements=sum(lengths), p=case.p)
        yield count + 15, f"{buffer} beside {storage}, {len(sizes)} tensors, shift {shift}"


def panels(device: str, dtypes: Sequence, shifts: Sequence[int]) -> Counted:
    losses = torch.ones(2, dtype=torch.float64, device=device)
    some = [1, 0, 33, 1030, (3, 5), *(k % 13 for k in range(SEGMENTS + 2))]
    cases = [(some, *case) for case in itertools.product(dtypes, (3, 14, 32, 1, 8), shifts)]
    if device == "cuda":
        cases[:0] = [(LONG, *case, 0) for case in itertools.product(dtypes[:2], (5, 14))]
    for sizes, (buffer, storage), k, shift in cases:
        count, case = 0, on(device, make_case(sizes, buffer, storage, gap=16), shift)
        n = case.q.numel()

        def panel(rows=k, dtype=buffer, n=n, shift=shift):
            whole = torch.randn(rows * n + shift, device=device).to(dtype)
            return whole[shift:].view(rows, n)

        q, d, p, p_next = (panel() for _ in range(4))
        g1, copies = panel(dtype=storage), panel(dtype=storage)
        state = ops.new_panel_state(device, k, perturbation=0.1, beta=0.3)

        def field(name, state=state, k=k):
            return ops.panel_field(state, k, name)

        for realised, heavy in itertools.product((False, True), (False, True)):
            options = {"weight_decay": 0.1, "theta": case.theta if realised else None}
            if heavy:
                options |= {"momentum": 0.5, "p": p, "p_next": p_next}
            sums = ops.panel_ascent_(d, q, case.g0, g1, case.offsets, state, **options)
            ops.benettin_(*(state, sums, losses, k), realised=realised, momentum=0.5 * heavy)
            field("again").fill_(1.0)
            ops.combine_(d, d, field("transform"), gate=field("again"))
            second = ops.gram(d, d, gate=field("again"))
            ops.benettin_refine_(state, second, k)
            field("pending").fill_(1.0)
            ops.panel_recenter_(q, copies, d, case.theta, case.offsets, state)
            count += 6
        taken = (case.theta, case.g0, case.offsets, d, state)
        for name, value in {"accepted": 1.0, "pending": 1.0, "h_ema": 2.0, "residual": 0.5}.items():
            field(name).fill_(value)
        for kind in ({}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}):
            options = {"weight_decay": 0.1, "buffer": case.p if kind else None, **kind}
            slopes = ops.panel_slopes_(*taken, **options)
            ops.panel_descend_(*taken, slopes, **options)
            count += 2
        field("reseed").fill_(float(k))
        lengths = [tensor.numel() for tensor in case.theta]
        ops.reseed_(q, case.offsets, lengths, state, elements=sum(lengths), p=p)
        yield count + 1, f"{buffer} beside {storage}, k = {k}, shift {shift}, {len(sizes)} tensors"


def krylov_vectors(device: str, dtypes: Sequence, shifts: Sequence[int]) -> Counted:
    buffers = dict.fromkeys(buffer for buffer, _ in dtypes)
    for rows, columns, dtype in itertools.product((128, 31, 1), (127, 40, 2), buffers):
        a, b = (torch.randn(r, 1031, dtype=dtype, device=device) for r in (rows, columns))
        matrix = torch.randn(rows, columns, dtype=torch.float64, device=device)
        ops.gram(a, b)
        ops.gram(a, a)
        ops.combine_(b, a, matrix)
        w = torch.randn(1031, dtype=dtype, device=device)
        ops.project_(w, a, torch.randn(rows, dtype=torch.float64, device=device))
        ops.project_(w, a[:0], matrix[:0, 0].contiguous())
        yield 5, f"{dtype}, {rows} and {columns} rows"
    for rows in (7, 14, 40) if device == "cuda" else ():
        a = torch.randn(rows, LONG[0] + 1, device=device)
        w = torch.randn_like(a[0])
        ops.gram(a, a)
        ops.combine_(a, a, torch.randn(rows, rows, dtype=torch.float64, device=device))
        ops.project_(w, a, torch.randn(rows, dtype=torch.float64, device=device))
        yield 3, f"{rows} long rows"


PARTS = {"one separation": one_separation, "panels": panels, "Krylov vectors": krylov_vectors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rehearse", action="store_true", help="a few, on the CPU")
    options = parser.parse_args()
    device, given = "cuda", (DTYPES, (0, 1))
    if options.rehearse:
        device, given = "cpu", (DTYPES[:1], (1,))
    lines = Lines.of_environment()
    for count, what in PARTS[options.part](device, *given):
        if device == "cuda":
            torch.cuda.synchronize()
        lines.write("calls", count=count, what=what)
        print(f"{count} calls: {what}", flush=True)


if __name__ == "__main__":
    main()
