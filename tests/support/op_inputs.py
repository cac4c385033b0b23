"""Random arguments for the ops: buffers with segments, gaps and views at odd addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: (dtype of the buffers, dtype of gradients and parameters beside them): all there are.
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F64, F64)]
#: Those that builds with sanitizers have (LYAPCUDA_FEW_TYPES).
FEW_DTYPES = DTYPES[:2]
#: Numbers of separations: around the tiles of 4 × 3 rows, and the most there may be.
COUNTS = [1, 2, 3, 5, 14, 32]
#: Around the lanes of a vector, tiles of 256 and 512, blocks of 4096 and 16384 elements.
TAILS = [0, 1, 7, 8, 9, 31, 33, 255, 257, 511, 513, 4097]
LONG_TAILS = [16383, 16385, 100003]
#: Segments of every kind, beside each other.
SEGMENTS = [9, 0, (), (3, 0, 2), 4097, (33, 7), 1]
#: Outputs of more elements than 2**21 are written around the cache.
LARGE = 2**21 + 16384 + 9
#: What surrounds the segments: nothing may touch it.
GUARD = -7777.0


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def bits(tensor: Tensor) -> Tensor:
    """The bytes as integers, so that NaN equals NaN and −0 differs from 0."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(same_size[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    different = (bits(actual) != bits(expected)).sum()
    assert not different, f"{different} of {actual.numel()} elements differ"


def number(value: float) -> Tensor:
    """A scalar as the ops take it."""
    return torch.tensor([value], dtype=F64)


def guarded(size: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    """`size` elements inside a longer tensor full of GUARD, ``shift`` elements off alignment.

    Nothing lies behind what is an odd number of elements off, so that AddressSanitizer sees a read
    beyond the end.
    """
    behind = 0 if shift % 2 else 64
    return torch.full((size + shift + behind,), GUARD, dtype=dtype)[shift : shift + size]


def whole(tensor: Tensor) -> Tensor:
    """All of the memory that a view is of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Inputs:
    """What the arguments of one call are drawn from.

    Segments of the given ``sizes`` (numbers, or shapes) lie in buffers of n elements, with ``gap``
    elements of GUARD before, between and after them; every tensor starts ``shift`` elements off
    alignment. ``exact``: small whole numbers and powers of two, so that every product and sum that
    an op forms is exact in any of the dtypes, and its results must be the oracle's to the last bit.
    """

    def __init__(
        self,
        sizes: Sequence[int | tuple[int, ...]],
        k: int = 1,
        buffer: torch.dtype = F32,
        storage: torch.dtype = F32,
        *,
        exact: bool = False,
        gap: int = 5,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        self.k, self.buffer, self.storage, self.exact, self.shift = k, buffer, storage, exact, shift
        self.generator = torch.Generator().manual_seed(seed)
        self.shapes = [(size,) if isinstance(size, int) else size for size in sizes]
        self.counts = [torch.Size(shape).numel() for shape in self.shapes]
        self.offsets, self.n = [], gap
        for count in self.counts:
            self.offsets.append(self.n)
            self.n += count + gap
        self.text = (
            f"Inputs({sizes}, {k}, {buffer}, {storage}, {exact=}, {gap=}, {shift=}, {seed=})"
        )

    def __repr__(self) -> str:
        return self.text

    def random(self, tensor: Tensor, span: float = 1.0) -> Tensor:
        if self.exact:
            drawn = torch.randint(-7, 8, tensor.shape, generator=self.generator)
            return tensor.copy_(drawn)
        drawn = torch.randn(tensor.shape, generator=self.generator, dtype=F64)
        return tensor.copy_(drawn * span)

    @cached_property
    def used(self) -> Tensor:
        """True at the elements of a buffer that belong to a segment."""
        used = torch.zeros(self.n, dtype=torch.bool)
        for offset, count in zip(self.offsets, self.counts, strict=True):
            used[offset : offset + count] = True
        return used

    def panel(
        self, rows: int | None = None, dtype: torch.dtype | None = None, span: float = 1.0
    ) -> Tensor:
        rows = self.k if rows is None else rows
        out = guarded(rows * self.n, dtype or self.buffer, self.shift).view(rows, self.n)
        return out.copy_(torch.where(self.used, self.random(torch.empty_like(out), span), out))

    def flat(self, span: float = 1.0) -> Tensor:
        return self.panel(1, span=span)[0]

    def listed(self, span: float = 1.0) -> list[Tensor]:
        """A tensor a segment, of the storage's dtype."""
        drawn = self.random(torch.empty(sum(self.counts), dtype=self.storage), span)
        return [
            guarded(len(part), self.storage, self.shift).copy_(part).view(shape)
            for part, shape in zip(drawn.split(self.counts), self.shapes, strict=True)
        ]

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Numbers that the buffers' dtype holds; where exact, ±1 and ±1/2."""
        if self.exact:
            drawn = torch.randint(0, 4, (rows, columns), generator=self.generator)
            return torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=F64)[drawn]
        drawn = torch.randn(rows, columns, generator=self.generator, dtype=F64)
        return drawn.to(self.buffer).double()

    def displacements(self, k: int) -> Tensor:
        """Positive numbers that the buffers' dtype holds; where exact, powers of two."""
        places = torch.arange(k, dtype=F64)
        return (
            2.0 ** (places % 3 - 1) if self.exact else (0.3 + 0.1 * places).to(self.buffer).double()
        )

    def metric(self) -> Tensor:
        """The S of a diagonal metric, 0 in places; where exact, powers of two."""
        out = self.panel(1)[0]
        drawn = 2.0 ** (out % 3) if self.exact else out.abs() + 0.1
        return out.copy_(torch.where(self.used & (out.abs() > self.number(6.5, 2.0)), 0.0, drawn))

    def number(self, exact: float, otherwise: float) -> float:
        return exact if self.exact else otherwise

    def state(self, k: int | None = None, **values: float | Tensor) -> Tensor:
        """A state in which a step is under way, with curvatures that fall to a negative one."""
        k = k or self.k
        if self.exact:
            h = torch.tensor([8.0, 4.0] + [2.0] * 30, dtype=F64)[:k]
        else:
            h = torch.linspace(8.0, -0.5, k, dtype=F64) if k > 1 else torch.tensor([3.7])
        known: dict[str, Any] = {"perturbation": 0.5, "beta": self.number(0.5, 0.213)}
        known |= {"transform": self.matrix(k, k), "pending": 1.0, "accepted": 1.0, "h_ema": h}
        known |= {"residual": self.number(0.0, 0.25), "steps": 5.0, "skipped": 2.0}
        known |= {"displacement": self.displacements(k)}
        return ops.new_state("cpu", k, **{**known, **values})


def at(row: Tensor, like: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    """Views of a buffer where a list's tensors lie in it."""
    return [
        row[offset : offset + t.numel()].view(t.shape)
        for t, offset in zip(like, offsets, strict=True)
    ]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, of a list or of arguments by name."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def cloned(value: Any) -> Any:
    """A copy of arguments: whole storages, so that views stay views and what shares memory does."""
    storages: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copy(item) for name, item in value.items()}
        if isinstance(value, list):
            return [copy(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        address = value.untyped_storage().data_ptr()
        if address not in storages:
            here = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            storages[address] = here.clone()
        out = torch.empty(0, dtype=value.dtype)
        storage = storages[address].untyped_storage()
        return out.set_(storage, value.storage_offset(), value.shape, value.stride())

    return copy(value)
