"""What every solver works on: a basis of flat vectors, the product, and what it ends with.

Solvers see H through a product alone, of vectors that are one flat buffer a `FlatGroup`; a basis is
a panel a group. Small matrices are NumPy in float64. Products are differences of gradients, so the
projected matrix isn't quite symmetric: its whole is kept, and what is not symmetric in it tells how
good the differences are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lyapcuda import panel_ops
from lyapcuda.flat import FlatLayout
from lyapcuda.ritz import Verdict

__all__ = ["MAX_ROWS", "Basis", "Product", "Report", "Solution", "on_host"]

#: Rows of a panel that the ops take.
MAX_ROWS = 128

#: Writes H times the first (norm 1) to the second; returns a loss.
Product = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
#: Called with the verdict of every iteration.
Report = Callable[[Verdict], None]


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

    def gram(self, other: Basis) -> Tensor:
        """(rows, rows of the other) float64, on the first group's device."""
        pairs = zip(self.panels, other.panels, strict=True)
        return _sum([panel_ops.gram(a, b) for a, b in pairs])

    def combine_(self, panel: Basis, matrix: Tensor) -> None:
        """Rows of self = matrixᵀ · rows of ``panel``, which may start at the same memory."""
        for out, rows in zip(self.panels, panel.panels, strict=True):
            panel_ops.combine_(out, rows, matrix.to(rows.device))

    def orthogonalise_(self, i: int) -> Tensor:
        """Row i made orthogonal to the rows before it, and of norm 1 (or zero).

        Returns:
            (i + 3,) float64 on the device: the i products with the rows before, and the squared
            norm of what was left after one, two and three passes (as many as it took).
        """
        before = slice(0, i)
        if i:
            total = self[before].gram(self[i : i + 1])[:, 0]
        else:
            total = torch.zeros(0, dtype=torch.float64, device=self.panels[0].device)
        # Every pass reads the whole basis, and sees what the one before has left: mostly rounding.
        enough = 100.0 * torch.finfo(self.panels[0].dtype).eps
        coefficients, squares = total, []
        while True:
            result = _sum(
                [
                    panel_ops.project_(p[i], p[before], coefficients.to(p.device))
                    for p in self.panels
                ]
            )
            coefficients = result[:-1]
            squares.append(result[-1])
            left = coefficients.cpu().abs().max() if i else 0.0
            if len(squares) == 3 or bool(left <= enough * squares[-1].sqrt().cpu()):
                break
            total = total + coefficients
        squares += squares[-1:] * (3 - len(squares))
        inverse = torch.where(squares[-1] > 0, squares[-1].rsqrt(), 0.0).reshape(1, 1)
        self[i : i + 1].combine_(self[i : i + 1], inverse)
        return torch.cat([total, torch.stack(squares)])

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


@dataclass
class Solution:
    """What a solver ended with: the verdict, the eigenvectors, and how it went."""

    verdict: Verdict
    vectors: Basis
    iterations: int
    #: Values and residuals of every iteration.
    history: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def on_host(tensor: Tensor) -> np.ndarray:
    """Dot products of an iteration; FloatingPointError where one isn't finite."""
    values = tensor.cpu().numpy()
    if not np.isfinite(values).all():
        raise FloatingPointError(
            "a gradient beside θ isn't finite (or the parameters' precision doesn't show a "
            "displacement of this size: try a larger perturbation)"
        )
    return values
