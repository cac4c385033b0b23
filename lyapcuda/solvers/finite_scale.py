"""Curvature along given vectors as it depends on the scale it is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lyapcuda.arguments import described, positive
from lyapcuda.plots.figure import Plotted
from lyapcuda.plots.spectrum import draw_scales
from lyapcuda.solvers.operator import HessianOperator, accepts_closure
from lyapcuda.solvers.result import EigenResult
from lyapcuda.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FiniteScale", "finite_scale"]


@dataclass(frozen=True, repr=False)
class FiniteScale(Plotted):
    """Curvature along given vectors at separations of several sizes.

    Attributes:
        perturbations: (s,) Δq.
        curvatures: (s, k) u·(g(θ + Δq·u) − g(θ − Δq·u))/(2Δq): the mean of the second derivative
            over [−Δq, Δq] along u, kinks included.
        gradient_evaluations: 2·s·k, and one.
    """

    perturbations: Tensor
    curvatures: Tensor
    gradient_evaluations: int

    def __repr__(self) -> str:
        head = ("Δq", *(f"vector {i}" for i in range(self.curvatures.shape[1])))
        rows = [
            (f"{size:.2g}", *(f"{value:.6g}" for value in row))
            for size, row in zip(self.perturbations.tolist(), self.curvatures.tolist(), strict=True)
        ]
        lines = aligned([head, *rows], ">" * len(head))
        return "\n".join([f"FiniteScale: {self.gradient_evaluations} gradients", *lines])

    def _draw(self, ax: Axes) -> None:
        draw_scales(ax, self.perturbations, self.curvatures)


@accepts_closure
def finite_scale(
    operator: HessianOperator,
    vectors: EigenResult | Tensor,
    perturbations: Sequence[float] | None = None,
) -> FiniteScale:
    """How the curvature along the found vectors depends on the scale it is measured at.

    On a smooth loss it doesn't, for small ones; kinks (ReLU) put a curvature into differences that
    the Hessian doesn't have.

    Args:
        operator: the Hessian, which is measured by central differences here; or, as the short form,
            a closure and its parameters, and further arguments of `HessianOperator` by name.
        vectors: a result of `eigsh`, or (k, n) vectors of any norm, in the parameters' order.
        perturbations: two or more separations. Default: that of the result (for vectors: the one
            advised) and a tenth and ten times of it.

    Raises:
        TypeError, ValueError: naming the argument and its value.

    Example:
        >>> p = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
        >>> H = HessianOperator(lambda: p.relu().sum() + p.square().sum(), [p])
        >>> finite_scale(H, torch.ones(1, 1), [0.01, 1.0]).curvatures  # the kink is 0.1 away
        tensor([[2.0000],
                [2.5000]], dtype=torch.float64)
    """
    if not isinstance(operator, HessianOperator):
        raise TypeError(
            f"operator={described(operator)}: finite_scale is of a HessianOperator's differences "
            "of gradients"
        )
    before, operator = operator.gradient_evaluations, operator.central()
    rows = vectors.eigenvectors if isinstance(vectors, EigenResult) else vectors
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != operator.shape[0]:
        raise ValueError(
            f"vectors: expected an EigenResult or (k, {operator.shape[0]}), got {described(rows)}"
        )
    if perturbations is None:
        middle = getattr(vectors, "perturbation", None) or operator.perturbation
        perturbations = (middle / 10.0, middle, middle * 10.0)
    sizes = list(perturbations) if isinstance(perturbations, Iterable) else []
    if len(sizes) < 2:
        raise ValueError(f"perturbations={described(perturbations)}: expected two or more")
    for size in sizes:
        positive("perturbations", size)
    table = []
    for size in sizes:
        products = [
            (u.double(), operator.matvec(u, perturbation=float(size)).double())
            for u in map(operator.coordinates, rows)
        ]
        table.append(torch.stack([(u @ y) / (u @ u) for u, y in products]))
    return FiniteScale(
        torch.tensor(sizes, dtype=torch.float64),
        torch.stack(table),
        operator.gradient_evaluations - before,
    )
