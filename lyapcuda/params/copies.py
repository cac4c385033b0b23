"""The copies θ + q as tensors: views of flat buffers, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lyapcuda.params.flat import FlatLayout

__all__ = ["Copies", "Copy"]


@dataclass(frozen=True)
class Copy:
    """One flat buffer a group, as tensors.

    Attributes:
        tensors: shaped like the parameters, in the order of `FlatLayout.parameters`.
        segments: of every group, as of `FlatGroup.segments`.
    """

    tensors: list[Tensor]
    segments: list[list[Tensor]]


class Copies:
    """The views of the buffers that copies lie in. To make them takes longer than most of a step,
    so they are kept by the buffers' addresses.
    """

    def __init__(self, layout: FlatLayout) -> None:
        self._layout = layout
        self._made: dict[tuple[int, ...], Copy] = {}

    def of(self, buffers: Sequence[Tensor]) -> Copy:
        """The copy in these buffers, one a group."""
        address = tuple(buffer.data_ptr() for buffer in buffers)
        made = self._made.get(address)
        if made is None:
            groups, tensors = self._layout.groups, self._layout.views(buffers)
            segments = [group.segments(group.own(tensors)) for group in groups]
            made = self._made[address] = Copy(tensors, segments)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # of other memory, in a copy
