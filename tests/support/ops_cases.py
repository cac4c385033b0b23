"""Inputs for the tests of the ops: flat buffers with segments, gaps and views at odd addresses."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lyapcuda import ops

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: (dtype of the buffers, dtype of gradients and parameters beside them): all there are.
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)]
#: dtypes of gradients and parameters.
STORAGE = [F32, F64, BF16, F16]
#: (realised, heavy): the kinds of steps.
KINDS = list(itertools.product((False, True), (False, True)))
#: The place of each sum.
SUM = {name: i for i, name in enumerate(ops.SUM_FIELDS)}
#: Around the 8 lanes of a vector and the 16384 elements of a block.
TAILS = [0, 1, 7, 8, 9, 31, 33, 255, 257, 4097, 16383, 16385, 100003]
#: Outputs of more elements than 2**21 are written around the cache.
LARGE = 2**21 + 16384 + 9
#: What surrounds the segments: nothing may touch it.
GUARD = -7777.0


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def bits(tensor: Tensor) -> Tensor:
    """The bytes as integers, so that NaN equals NaN and −0 differs from 0."""
    same_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(same_size[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    different = (bits(actual) != bits(expected)).sum()
    assert not different, f"{different} of {actual.numel()} elements differ"


def number(value: float) -> Tensor:
    """A scalar as the ops take it."""
    return torch.tensor([value], dtype=F64)


def guarded(size: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """`size` elements inside a longer tensor full of GUARD, ``shift`` elements off alignment."""
    return torch.full((size + shift + 64,), GUARD, dtype=dtype)[shift : shift + size]


def surroundings(tensor: Tensor) -> Tensor:
    """What lies around a tensor made by `guarded`, as a copy."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    return torch.cat([whole[:start], whole[start + tensor.numel() :]])


@dataclass
class Case:
    """Everything the ops take. `shift` puts every tensor that many elements off alignment."""

    q: Tensor
    d: Tensor
    p: Tensor
    p_next: Tensor
    g0: list[Tensor]
    g1: list[Tensor]
    theta: list[Tensor]
    theta1: list[Tensor]
    offsets: list[int]
    state: Tensor

    def gaps(self) -> Tensor:
        """True at the elements of a flat buffer that belong to no segment."""
        free = torch.ones(self.q.numel(), dtype=torch.bool)
        for offset, g in zip(self.offsets, self.g0, strict=True):
            free[offset : offset + g.numel()] = False
        return free

    def tensors(self) -> Iterator[Tensor]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            else:
                yield from (item for item in value if isinstance(item, Tensor))

    def clone(self) -> Case:
        """A deep copy (without the surroundings)."""

        def copy(value):
            if isinstance(value, Tensor):
                return value.clone()
            return [x.clone() if isinstance(x, Tensor) else x for x in value]

        return Case(*(copy(getattr(self, field.name)) for field in fields(self)))


def make_case(
    sizes: Sequence[int | tuple[int, ...]],
    buffer: torch.dtype = F32,
    storage: torch.dtype = F32,
    *,
    exact: bool = False,
    gap: int = 5,
    shift: int = 0,
    seed: int = 0,
    **state: float,
) -> Case:
    """Random inputs with a gap of GUARD before, between and after the segments.

    ``exact``: small integers and powers of two, so that every product and sum the ops form is
    exact in any of the dtypes and results must equal the oracle's to the last bit.
    """
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

    def flat() -> Tensor:
        out = guarded(end, buffer, shift)
        for offset, count in zip(offsets, counts, strict=True):
            fill(out[offset : offset + count], 1.0)
        return out

    def listed(span: float) -> list[Tensor]:
        return [
            fill(guarded(count, storage, shift), span).view(shape)
            for count, shape in zip(counts, shapes, strict=True)
        ]

    values = {"perturbation": 0.5, "scale": 0.25, "beta": 0.5, "h": 2.0, "h_ema": 2.0}
    if not exact:
        values |= {"scale": 0.0371, "beta": 0.213, "h": 3.7, "h_ema": 3.7}
    values["accepted"] = 1.0
    return Case(
        q=flat(),
        d=flat(),
        p=flat(),
        p_next=flat(),
        g0=listed(0.3),
        g1=listed(0.3),
        theta=listed(1.0),
        theta1=listed(1.0),
        offsets=offsets,
        state=ops.new_state("cpu", **{**values, **state}),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def state_with(state: Tensor, **values: float) -> Tensor:
    """A copy of the state with some fields changed."""
    out = state.clone()
    for name, value in values.items():
        out[ops.STATE_FIELDS.index(name)] = value
    return out


def fields_of(state: Tensor) -> dict[str, float]:
    return dict(zip(ops.STATE_FIELDS, state.tolist(), strict=True))


def ascent_options(case: Case, *, realised: bool, heavy: bool) -> dict[str, object]:
    """The optional arguments of `ops.ascent_` that a kind of step takes."""
    options: dict[str, object] = {"weight_decay": 0.5}
    if realised:
        options["theta"] = case.theta
    if heavy:
        options |= {"momentum": 0.5, "p": case.p, "p_next": case.p_next}
    return options


def run_every_op() -> list[str]:
    """A digest of every tensor the ops write, for inputs that use all their paths."""
    written: list[str] = []

    def note(*tensors: Tensor) -> None:
        written.extend(hashlib.sha256(bits(t).numpy()).hexdigest() for t in tensors)

    for (buffer, storage), sizes in itertools.product(
        DTYPES, ([5, 70001, 0, (), (3, 11)], [LARGE])
    ):
        case = make_case(sizes, buffer, storage, gap=16, shift=int(len(sizes) > 1))
        kinds = (
            itertools.product((False, True), (False, True)) if len(sizes) > 1 else [(False,) * 2]
        )
        for realised, heavy in kinds:
            options = ascent_options(case, realised=realised, heavy=heavy)
            step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
            note(ops.ascent_(*step, **options), case.d, case.p_next)
        for committed in (0.0, 1.0):
            state = state_with(case.state, committed=committed)
            beside = {"p": case.d, "p_previous": case.p_next}
            ops.recenter_(case.theta1, case.q, case.p, case.theta, case.offsets, state, **beside)
            note(case.q, case.d, *case.theta1)
        for nesterov in (None, False, True):
            options = {"weight_decay": 0.1}
            if nesterov is not None:
                options |= {"momentum": 0.9, "nesterov": nesterov, "buffer": case.p}
                options["offsets"] = case.offsets
            note(ops.descend_(case.theta, case.g0, case.state, **options), *case.theta, case.p)
        ops.stream_copy_(case.d, case.q)
        note(case.d)
    return written


if __name__ == "__main__":  # test_ops.py runs this with other instruction sets
    print("\n".join(run_every_op()))
