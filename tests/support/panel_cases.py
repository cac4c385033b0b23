"""Inputs for the tests of the ops over panels, and what those ops compute, bit by bit.

torch's own elementwise operations round once each and never contract, so the ops' elements can be
asked for to the last bit; sums are held against float64 ones.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lyapcuda import ops
from ops_cases import DTYPES, F32, F64, bits, guarded

#: Rows of a panel of separations: around the tiles of 4 × 3 rows, and the most there may be.
COUNTS = [1, 2, 3, 5, 14, 32]
#: Rows of any panel.
ROWS = [*COUNTS, 128]
#: Around the lanes of a vector, the tiles of 256 and the blocks of 4096 elements.
TAILS = [1, 31, 33, 255, 257, 4097]
#: More than the 64 runs of one block each, so that a run has two.
LARGE = 64 * 4096 + 4097


def guarded_panel(rows: int, n: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    return guarded(rows * n, dtype, shift).view(rows, n)


def zero_panel(rows: int = 3, n: int = 40, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(rows, n, dtype=dtype)


def random_panel(
    rows: int, n: int, dtype: torch.dtype, shift: int = 0, seed: int = 0, exact: bool = False
) -> Tensor:
    """Normal or, where ``exact``, small whole numbers; ``shift`` elements off alignment."""
    generator = torch.Generator().manual_seed(seed)
    out = guarded_panel(rows, n, dtype, shift)
    if exact:
        return out.copy_(torch.randint(-7, 8, out.shape, generator=generator))
    return out.copy_(torch.randn(out.shape, generator=generator, dtype=F64))


def close_sums(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """Holds float64 sums against a·bᵀ, relative to the sums of the terms' sizes."""
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs().T
    assert ((actual - a @ b.T).abs() <= 1e-13 * size + 1e-300).all()


@dataclass
class PanelCase:
    """Everything the ops over panels take: as ops_cases.Case, with k rows."""

    q: Tensor
    d: Tensor
    p: Tensor
    p_next: Tensor
    g1: Tensor
    copies: Tensor
    g0: list[Tensor]
    theta: list[Tensor]
    offsets: list[int]
    state: Tensor

    @property
    def k(self) -> int:
        return self.q.shape[0]

    def used(self) -> Tensor:
        """True at the elements of a row that belong to a segment."""
        used = torch.zeros(self.q.shape[1], dtype=torch.bool)
        for offset, g in zip(self.offsets, self.g0, strict=True):
            used[offset : offset + g.numel()] = True
        return used

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """A list of tensors at the case's offsets, as a row of the buffers' dtype (gaps: 0)."""
        row = torch.zeros(self.q.shape[1], dtype=self.q.dtype)
        for offset, t in zip(self.offsets, tensors, strict=True):
            row[offset : offset + t.numel()] = t.flatten().to(row.dtype)
        return row

    def tensors(self) -> Iterator[Tensor]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            else:
                yield from (item for item in value if isinstance(item, Tensor))


def make_panel_case(
    k: int,
    sizes: Sequence[int | tuple[int, ...]],
    buffer: torch.dtype = F32,
    storage: torch.dtype = F32,
    *,
    exact: bool = False,
    gap: int = 5,
    shift: int = 0,
    seed: int = 0,
    **state: float | Tensor,
) -> PanelCase:
    """Random inputs with a gap of GUARD before, between and after the segments of every row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size,) if isinstance(size, int) else size for size in sizes]
    counts = [torch.Size(shape).numel() for shape in shapes]
    offsets, end = [], gap
    for count in counts:
        offsets.append(end)
        end += count + gap

    def fill(tensor: Tensor, span: float) -> Tensor:
        if exact:
            return tensor.copy_(torch.randint(-7, 8, tensor.shape, generator=generator))
        return tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=F64) * span)

    def panel(dtype: torch.dtype, span: float) -> Tensor:
        out = guarded_panel(k, end, dtype, shift)
        for offset, count in zip(offsets, counts, strict=True):
            fill(out[:, offset : offset + count], span)
        return out

    def listed(span: float) -> list[Tensor]:
        return [
            fill(guarded(count, storage, shift), span).view(shape)
            for count, shape in zip(counts, shapes, strict=True)
        ]

    values: dict[str, float | Tensor] = {"perturbation": 0.5, "beta": 0.5 if exact else 0.213}
    mixed = torch.randn(k, k, generator=generator, dtype=F64)
    values["transform"] = (mixed * 2).round() / 2 if exact else mixed
    return PanelCase(
        q=panel(buffer, 1.0),
        d=panel(buffer, 1.0),
        p=panel(buffer, 1.0),
        p_next=panel(buffer, 1.0),
        g1=panel(storage, 0.3),
        copies=panel(storage, 1.0),
        g0=listed(0.3),
        theta=listed(1.0),
        offsets=offsets,
        state=ops.new_panel_state("cpu", k, **{**values, **state}),
    )


def panel_ascent_options(
    case: PanelCase, *, realised: bool, heavy: bool, weight_decay: float = 0.5
) -> dict[str, object]:
    options: dict[str, object] = {"weight_decay": weight_decay}
    if realised:
        options["theta"] = case.theta
    if heavy:
        options |= {"momentum": 0.5, "p": case.p, "p_next": case.p_next}
    return options


def ascent_bits(case: PanelCase, sign: int, realised: bool, heavy: bool, weight_decay: float = 0.5):
    """(d, p_next, the stacked rows) of panel_ascent_ as its arithmetic in T has them; gaps: 0."""
    buffer, storage, used = case.q.dtype, case.g1.dtype, case.used()

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=buffer)

    rate = number(sign * float(ops.panel_field(case.state, case.k, "beta")))
    carried = torch.where(used, case.q, number(0.0))
    moved = carried
    if realised:
        here = case.flat(case.theta)
        moved = (here + carried).to(storage).to(buffer) - here
    gradient = torch.where(used, case.g1, torch.zeros((), dtype=storage)).to(buffer)
    y = (gradient - case.flat(case.g0)) + moved * number(weight_decay)
    w = torch.where(used, case.p, number(0.0)) * number(0.5) + y if heavy else y
    d = carried + w * rate
    rows = [carried, y] + [moved] * realised + [d] * heavy
    return d, w, torch.cat(rows)


def combined_bits(panel: Tensor, matrix: Tensor) -> Tensor:
    """Σ_i panel_i·matrix[i][j], i ascending, each product and sum rounded."""
    factors = matrix.to(panel.dtype)
    out = panel[0] * factors[0][:, None]
    for i in range(1, panel.shape[0]):
        out = out + panel[i] * factors[i][:, None]
    return out


def run_every_panel_op() -> list[str]:
    """A digest of every tensor the ops over panels write, and of a few others."""
    written: list[str] = []

    def note(*tensors: Tensor) -> None:
        written.extend(hashlib.sha256(bits(t).numpy()).hexdigest() for t in tensors)

    losses = torch.ones(2, dtype=F64)
    for (buffer, storage), k in itertools.product(DTYPES, (1, 3, 14)):
        sizes = [5, 9001, 0, (), (3, 11)] if k != 3 else [LARGE, 7]
        case = make_panel_case(k, sizes, buffer, storage, shift=int(k != 3))
        panels = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        for realised, heavy in itertools.product((False, True), (False, True)):
            options = panel_ascent_options(case, realised=realised, heavy=heavy)
            sums = ops.panel_ascent_(*panels, **options)
            state = case.state.clone()
            known = {"momentum": 0.5 * heavy, "realised": realised}
            ops.benettin_(state, sums, losses, k, **known)
            note(sums, case.d, case.p_next, state)
        for pending in (0.0, 1.0):
            ops.panel_field(case.state, k, "pending").fill_(pending)
            ops.panel_recenter_(case.q, case.copies, case.d, case.theta, case.offsets, case.state)
            note(case.q, case.copies)
        matrix = torch.randn(k, k, generator=torch.Generator().manual_seed(k), dtype=F64)
        note(ops.gram(case.q, case.d), ops.gram(case.q, case.q))
        ops.combine_(case.d, case.q, matrix)
        note(case.d, ops.project_(case.p[0], case.q, matrix[0]), case.p)
        step = torch.tensor([0.3], dtype=F64)
        views = [
            case.copies[0, o : o + t.numel()] for o, t in zip(case.offsets, case.theta, strict=True)
        ]
        note(ops.displace_(views, case.q[0], case.theta, case.offsets, step), *views)
        options = {"keep": 0.5, "weight_decay": 0.1, "v": case.q[0]}
        ops.difference_(case.d[0], views, case.theta, case.offsets, step, **options)
        note(case.d)
        for name, value in {"accepted": 1.0, "pending": 1.0, "h_ema": 2.0, "residual": 0.5}.items():
            ops.panel_field(case.state, k, name).fill_(value)
        for nesterov in (None, False, True):
            options = {"weight_decay": 0.1}
            if nesterov is not None:
                options |= {"momentum": 0.9, "nesterov": nesterov, "buffer": case.p[0]}
            newton = (case.theta, case.g0, case.offsets, case.d, case.state)
            slopes = ops.panel_slopes_(*newton, **options)
            note(ops.panel_descend_(*newton, slopes, **options), slopes, *case.theta, case.p)
    return written


if __name__ == "__main__":  # test_ops.py runs this with other instruction sets
    print("\n".join(run_every_panel_op()))
