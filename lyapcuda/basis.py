"""Vectors over all parameters, as the rows of one panel a group: what bases are made of.

Small matrices are float64. Sums run over the elements of all ranks.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.params.flat import FlatLayout

__all__ = ["MAX_ROWS", "Basis"]

# MADV_DONTNEED: the pages are gone, and read as zeros from here on
_DONTNEED = 4
#: Rows of a panel that the ops take.
MAX_ROWS = 128


class Basis:
    """Vectors as the rows of one panel a group."""

    def __init__(self, layout: FlatLayout, panels: list[Tensor]) -> None:
        self.layout, self.panels = layout, panels

    @classmethod
    def empty(cls, layout: FlatLayout, rows: int) -> Basis:
        """Zeros: the gaps between segments stay so."""
        return cls(layout, [group.new_panel(rows) for group in layout.groups])

    def __getitem__(self, rows: slice) -> Basis:
        return Basis(self.layout, [panel[rows] for panel in self.panels])

    def __len__(self) -> int:
        return len(self.panels[0])

    def row(self, i: int) -> list[Tensor]:
        """One vector: a flat buffer a group."""
        return [panel[i] for panel in self.panels]

    def release(self) -> None:
        """What these rows hold is no longer needed: on the CPU, their memory is given back."""
        for panel in self.panels:
            release_pages(panel)

    def gram(self, other: Basis, weights: Sequence[Tensor] | None = None) -> Tensor:
        """(rows, rows of the other) float64, on the first group's device.

        Args:
            other: another, or self.
            weights: a flat buffer a group, which every row is taken times; None for 1.
        """
        return self.layout.reduce(self.partial_gram(other, weights))

    def partial_gram(self, other: Basis, weights: Sequence[Tensor] | None = None) -> Tensor:
        """The same, over this rank's elements alone."""
        weights = weights or [None] * len(self.panels)
        groups = zip(self.panels, other.panels, weights, strict=True)
        return _sum([ops.gram(a, b, weights=w) for a, b, w in groups])

    def combine_(self, panel: Basis, matrix: Tensor) -> None:
        """Rows of self = matrixᵀ · rows of ``panel``, which may start at the same memory."""
        for out, rows in zip(self.panels, panel.panels, strict=True):
            ops.combine_(out, rows, matrix.to(rows.device))

    def orthogonalise_(self, i: int, squares: np.ndarray | None = None) -> np.ndarray:
        """Row i made orthogonal to the rows before it.

        Args:
            squares: the rows' squared norms, of which row i's is written: the row keeps its length,
                which saves a pass. None: the rows before have norm 1, and row i gets it (or zero).

        Returns:
            (i + 3,) float64: the i products with the rows before, over their norms; and the squared
            norm of what was left after one, two and three passes (as many as it took).
        """
        before, device = slice(0, i), self.panels[0].device
        sizes = np.ones(i) if squares is None else squares[:i]
        inverse = np.divide(1.0, sizes, out=np.zeros(i), where=sizes > 0)
        factors = torch.as_tensor(inverse, device=device)
        # Every pass reads the whole basis, and sees what the one before has left: mostly rounding.
        enough = 100.0 * torch.finfo(self.panels[0].dtype).eps
        coefficients = self[before].gram(self[i : i + 1])[:, 0] * factors if i else factors
        total, passes = coefficients, []
        while True:
            result = self.layout.reduce(
                _sum(
                    [ops.project_(p[i], p[before], coefficients.to(p.device)) for p in self.panels]
                )
            )
            host = torch.cat([total, result]).cpu().numpy()
            passes.append(host[-1])
            with np.errstate(invalid="ignore"):
                left = (np.abs(host[i:-1]) * np.sqrt(inverse)).max(initial=0.0)
            if len(passes) == 3 or bool(left <= enough * np.sqrt(passes[-1])):
                break
            coefficients = result[:-1] * factors
            total = total + coefficients
        if squares is not None:
            squares[i] = passes[-1]
        else:
            scale = passes[-1] ** -0.5 if passes[-1] > 0 else 0.0
            matrix = torch.full((1, 1), scale, dtype=torch.float64, device=device)
            self[i : i + 1].combine_(self[i : i + 1], matrix)
        passes += passes[-1:] * (3 - len(passes))
        with np.errstate(invalid="ignore"):
            return np.concatenate([host[:i] * np.sqrt(sizes), passes])

    def randomise_(self, i: int, generators: Sequence[torch.Generator]) -> None:
        for group, panel, generator in zip(
            self.layout.groups, self.panels, generators, strict=True
        ):
            for view in group.views(panel[i]):
                view.normal_(generator=generator)


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def release_pages(tensor: Tensor) -> None:
    """Gives back to the system the whole pages of a contiguous tensor on the CPU.

    What it held is lost. Does nothing but on Linux.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = tensor.data_ptr()
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (first + tensor.numel() * tensor.element_size() - start) // mmap.PAGESIZE
    if size > 0:
        length = ctypes.c_size_t(size * mmap.PAGESIZE)
        # Where the system refuses, the memory stays for a while longer.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, _DONTNEED)
