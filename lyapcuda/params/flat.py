"""Parameters and gradients as flat buffers, without disturbing the module they belong to.

Parameters of one dtype, device and group of the user's form a `FlatGroup`: each has a segment of
the group's flat buffers, in the order its elements have in memory, so a dense parameter is read
where it lies, whatever its strides. Segments start at multiples of `ALIGNMENT` elements.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.params.collect import BUFFER_DTYPES, Parameters, collect
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.shards import any_sharded, local, locals_of, shard_of, whole

__all__ = [
    "ALIGNMENT",
    "FlatGroup",
    "FlatLayout",
]

#: Elements. 64 bytes of a 16-bit type, 128 of float32: vector loads of compiled models stay
#: aligned.
ALIGNMENT = 32
_KIND, _DTYPE = operator.attrgetter("shape", "dtype", "device"), operator.attrgetter("dtype")
# Bytes: where torch's own tensors start.
_LINE = 64


def squared_norm(tensor: Tensor) -> float:
    """Σ x² in float64, on the host; a piece at a time, so that no copy of the whole is made."""
    return float(sum(piece.double().square().sum() for (piece,) in pieces_of(tensor)))


def pieces_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat pieces of tensors of one shape, side by side."""
    return zip(*(tensor.reshape(-1).split(1 << 18) for tensor in tensors), strict=True)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


@dataclass
class FlatGroup:
    """Parameters of one dtype, device and group of the user's; where they lie in flat buffers.

    Of DTensor parameters the buffers hold this rank's shards.
    """

    names: list[str]
    tensors: list[Tensor]
    dtype: torch.dtype
    device: torch.device
    #: May change between two steps.
    weight_decay: float
    #: Which of the user's groups this is a part of.
    number: int
    #: Where each tensor stands among `FlatLayout.parameters`.
    positions: list[int]
    offsets: list[int] = field(init=False)
    strides: list[tuple[int, ...]] = field(init=False)
    #: How many elements each segment has.
    sizes: list[int] = field(init=False)
    #: Elements of a flat buffer, the gaps between segments included.
    length: int = field(init=False)
    _zeros: list[Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.offsets, self.length = [], 0
        held = [local(tensor) for tensor in self.tensors]
        for tensor in held:
            self.offsets.append(self.length)
            self.length += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        self.strides = [
            t.stride() if _is_dense(t) else torch.empty(t.shape, device="meta").stride()
            for t in held
        ]
        self._shapes = [t.shape for t in held]
        self.sizes = [t.numel() for t in held]
        self._kinds = [(shape, self.dtype, self.device) for shape in self._shapes]
        alike = [
            torch.empty_strided(shape, strides, device="meta")
            for shape, strides in zip(self._shapes, self.strides, strict=True)
        ]
        self._contiguous = [t.is_contiguous() for t in alike]
        self._standard = [
            torch.empty_like(t, memory_format=torch.contiguous_format).stride() == t.stride()
            for t in alike
        ]

    @property
    def buffer_dtype(self) -> torch.dtype:
        """float64 for float64 parameters, float32 for all others."""
        return BUFFER_DTYPES[self.dtype]

    @property
    def rounds(self) -> bool:
        """Whether a parameter can't hold what the buffers hold."""
        return self.dtype != self.buffer_dtype

    def new_buffer(self, dtype: torch.dtype | None = None) -> Tensor:
        """An all-zero flat buffer: the gaps between segments stay zero."""
        return torch.zeros(self.length, dtype=dtype or self.buffer_dtype, device=self.device)

    def new_panel(self, rows: int) -> Tensor:
        """(rows, length) of zeros: as many flat buffers. On the CPU, a row that is never touched
        takes no memory.
        """
        shape = (rows, self.length)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.buffer_dtype, device=self.device)
        # torch writes its zeros; NumPy gets pages that the system fills when they are first used.
        size = self.buffer_dtype.itemsize
        raw = torch.from_numpy(np.zeros(rows * self.length * size + _LINE, dtype=np.uint8))
        start = -raw.data_ptr() % _LINE
        flat = raw[start : start + rows * self.length * size].view(self.buffer_dtype)
        return flat.view(shape)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The segments of a flat buffer, shaped and strided like the parameters."""
        return [
            flat.as_strided(shape, strides, flat.storage_offset() + offset)
            for shape, strides, offset in zip(self._shapes, self.strides, self.offsets, strict=True)
        ]

    def panel_views(self, panel: Tensor) -> list[Tensor]:
        """The segments of a panel, a flat buffer a row: (rows, *shape) each."""
        rows, step = panel.shape
        return [
            panel.as_strided((rows, *shape), (step, *strides), panel.storage_offset() + offset)
            for shape, strides, offset in zip(self._shapes, self.strides, self.offsets, strict=True)
        ]

    def randomise_(self, flat: Tensor, generator: torch.Generator) -> None:
        """Fills the segments with normal numbers: the same whatever the number of ranks.

        Memory: one whole parameter, where the parameters are sharded.
        """
        for tensor, view in zip(self.tensors, self.views(flat), strict=True):
            if view.shape == tensor.shape:
                view.normal_(generator=generator)
            else:
                full = flat.new_empty(tensor.shape).normal_(generator=generator)
                view.copy_(shard_of(full, tensor))

    def own(self, tensors: Sequence[Any]) -> list[Any]:
        """This group's among things in the order of `FlatLayout.parameters`."""
        return [tensors[i] for i in self.positions]

    def segments(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors shaped like the parameters, as contiguous memory in segment order.

        Dense ones of the right strides are read where they lie; others are copied, and None (no
        gradient) becomes zeros. Detached, where gradients are being recorded.
        """
        held = locals_of(tensors)
        return list(held) if self._all_lie(held) else self._laid(range(len(held)), held)

    def _all_lie(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the tensors are segments as they lie: most are, so it is asked of all at once."""
        return (
            all(self._contiguous)
            and not torch.is_grad_enabled()
            and NoneType not in set(map(type, tensors))
            and set(map(_DTYPE, tensors)) == {self.dtype}
            and list(map(Tensor.stride, tensors)) == self.strides
        )

    def zeros(self) -> list[Tensor]:
        """Segments of zeros, to be read only: they share the memory of the largest."""
        if self._zeros is None:
            held = torch.zeros(max(self.sizes), dtype=self.dtype, device=self.device)
            self._zeros = [held[:size] for size in self.sizes]
        return self._zeros

    def segments_at(self, indices: Iterable[int], tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The same for tensors like some of the parameters, those at ``indices``."""
        return self._laid(indices, locals_of(tensors))

    def _laid(self, indices: Iterable[int], tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Each of this rank's tensors as a segment."""
        recording, found = torch.is_grad_enabled(), []
        dtype, strides, contiguous = self.dtype, self.strides, self._contiguous
        for i, tensor in zip(indices, tensors, strict=True):
            if tensor is None or tensor.dtype is not dtype or tensor.stride() != strides[i]:
                tensor, lies = self._matching(i, tensor)
            else:
                lies = contiguous[i]
            if recording and tensor.requires_grad:
                tensor = tensor.detach()
            found.append(tensor if lies else tensor.as_strided((self.sizes[i],), (1,)))
        return found

    def _matching(self, i: int, tensor: Tensor | None) -> tuple[Tensor, bool]:
        """What has the memory of segment i, and whether it is contiguous as a tensor."""
        if tensor is None:
            return torch.zeros(self.sizes[i], dtype=self.dtype, device=self.device), True
        if tensor.dtype == self.dtype and self._standard[i] and tensor.is_contiguous():
            return tensor, True  # strides of dimensions of size 1 are of no account
        matching = torch.empty_strided(
            self._shapes[i], self.strides[i], dtype=self.dtype, device=self.device
        )
        return matching.copy_(tensor.detach()), self._contiguous[i]

    def check(self) -> None:
        """Raises ValueError when a parameter isn't what it was: moved, cast or reshaped."""
        held = locals_of(self.tensors)
        if list(map(_KIND, held)) == self._kinds:
            return
        for name, tensor, shape in zip(self.names, held, self._shapes, strict=True):
            now = (tensor.shape, tensor.dtype, tensor.device)
            if now != (shape, self.dtype, self.device):
                raise ValueError(
                    f"params: {name} is now {tuple(now[0])} {now[1]} on {now[2]}, but was "
                    f"{tuple(shape)} {self.dtype} on {self.device}: make a new tracker"
                )


class FlatLayout:
    """All tracked parameters, in groups.

    Attributes:
        parameters: the tracked parameters, in the user's order.
        groups: the same in groups, in the order of first appearance.
        numel: how many numbers they hold (N), on all ranks together.
        ranks: those that share the parameters, None for one process. DTensors tell; for replicas
            (DDP) a tracker sets it.
        compute_epsilon: machine epsilon of a dtype that parameters are cast to for computing
            (FSDP2's mixed precision), as far as a tracker has seen.
    """

    compute_epsilon = 0.0

    def __init__(
        self, params: Parameters, weight_decay: float = 0.0, optimizer: Optimizer | None = None
    ) -> None:
        self.parameters = collect(params, weight_decay, optimizer=optimizer)
        members: dict[tuple, list[int]] = {}
        for position, p in enumerate(self.parameters):
            key = (p.tensor.dtype, p.tensor.device, p.weight_decay, p.group)
            members.setdefault(key, []).append(position)
        self.groups = []
        for key, positions in members.items():
            group = [self.parameters[i] for i in positions]
            self.groups.append(
                FlatGroup([p.name for p in group], [p.tensor for p in group], *key, positions)
            )
        self.numel = sum(p.tensor.numel() for p in self.parameters)
        if self.numel == 0:
            raise ValueError("params: all tensors are empty (0 elements)")
        self.ranks: Ranks | None = Ranks.of_mesh([p.tensor for p in self.parameters])

    @property
    def device(self) -> torch.device:
        """Where the scalars live: the device of the first group."""
        return self.groups[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of a vector over all parameters: float64 where any of them is, else float32."""
        return max((g.buffer_dtype for g in self.groups), key=lambda dtype: dtype.itemsize)

    def scatter(self, vector: Tensor, buffers: Sequence[Tensor]) -> None:
        """Writes a vector of ``numel`` elements in the user's order to one flat buffer a group."""
        parts = vector.split([p.tensor.numel() for p in self.parameters])
        for group, buffer in zip(self.groups, buffers, strict=True):
            for position, view in zip(group.positions, group.views(buffer), strict=True):
                view.copy_(parts[position].view(view.shape))

    def gather(self, buffers: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The inverse of `scatter`: a vector of `dtype` on `device`, ``out`` or a new one."""
        vector = out
        if vector is None:
            vector = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        parts = vector.split([p.tensor.numel() for p in self.parameters])
        for group, buffer in zip(self.groups, buffers, strict=True):
            for position, view in zip(group.positions, group.views(buffer), strict=True):
                parts[position].view(view.shape).copy_(view)
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector in the user's order, shaped like the parameters."""
        parts = vector.split([p.tensor.numel() for p in self.parameters])
        return [v.view(p.tensor.shape) for v, p in zip(parts, self.parameters, strict=True)]

    @property
    def sharded(self) -> bool:
        """Whether the buffers hold shards of the parameters, a part of them on every rank."""
        return any_sharded([p.tensor for p in self.parameters])

    def reduce(self, part: Tensor) -> Tensor:
        """Sums over all elements from sums over this rank's: float64, the same bits on all ranks.

        One collective where the parameters are sharded; elsewhere ``part`` itself.
        """
        return part if self.ranks is None else self.ranks.sum(part)

    def seeds(self, seed: int) -> list[int]:
        """One a group, other ones for other shards."""
        shard = 0 if self.ranks is None else self.ranks.shard
        return [(seed + number + (shard << 32)) % 2**63 for number in range(len(self.groups))]

    def whole(self, position: int, part: Tensor, *, rows: bool = False) -> Tensor:
        """What a user sees of a buffer's segment: a DTensor like the parameter, where that is one.

        ``rows``: the segment of a panel, with one more dimension in front.
        """
        return whole(part, self.parameters[position].tensor, rows=rows)

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of one flat buffer a group, in the user's order: shaped and strided like the
        parameters, of DTensors like this rank's part.
        """
        found: dict[int, Tensor] = {}  # by position
        for group, buffer in zip(self.groups, buffers, strict=True):
            found.update(zip(group.positions, group.views(buffer), strict=True))
        return [found[i] for i in range(len(found))]

    def unpack(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of one flat buffer or panel a group, in the user's order: shaped like the
        parameters (of a panel: a row each in front), DTensors where they are.
        """
        found: dict[int, Tensor] = {}  # by position
        for group, buffer in zip(self.groups, buffers, strict=True):
            rows = buffer.dim() == 2
            views = group.panel_views(buffer) if rows else group.views(buffer)
            for position, view in zip(group.positions, views, strict=True):
                found[position] = self.whole(position, view, rows=rows)
        return [found[i] for i in range(len(found))]

    def pack_(self, buffers: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        """The inverse of `unpack`: takes whole tensors, or DTensors cut in any way."""
        for group, buffer in zip(self.groups, buffers, strict=True):
            rows = buffer.dim() == 2
            views = group.panel_views(buffer) if rows else group.views(buffer)
            for position, tensor, view in zip(group.positions, group.tensors, views, strict=True):
                view.copy_(shard_of(saved[position], tensor, rows=rows))

    def norm(self) -> float:
        """‖θ‖ in float64. Reads back to the host: for the start of a run only."""
        square = sum(squared_norm(local(p.tensor).detach()) for p in self.parameters)
        part = torch.tensor([square], dtype=torch.float64, device=self.device)
        return math.sqrt(self.reduce(part).item())

    @property
    def largest(self) -> float:
        """What every flat buffer can hold."""
        return min(torch.finfo(group.buffer_dtype).max for group in self.groups)

    def epsilon(self) -> float:
        """Machine epsilon of the coarsest dtype that a parameter has, or is computed with."""
        return max(self.compute_epsilon, *(torch.finfo(group.dtype).eps for group in self.groups))
