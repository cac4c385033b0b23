"""The copies θ + q as tensors: views of flat buffers, made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lyapcuda.params.flat import FlatLayout

__all__ = ["Copies"]


class Copies:
    """The views of the panels that copies lie in. To make them takes longer than most of a step,
    so they are kept by the panels' addresses.
    """

    def __init__(self, layout: FlatLayout) -> None:
        self._layout = layout
        self._made: dict[tuple[int, ...], list[list[Tensor]]] = {}

    def of(self, panels: Sequence[Tensor]) -> list[list[Tensor]]:
        """The copies in these panels, one a group: of every row, tensors shaped like the
        parameters, in the order of `FlatLayout.parameters`. Not to be written to.
        """
        address = tuple(panel.data_ptr() for panel in panels)
        made = self._made.get(address)
        if made is None:
            rows = zip(*panels, strict=True)
            made = self._made[address] = [self._layout.views(row) for row in rows]
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # of other memory, in a copy
