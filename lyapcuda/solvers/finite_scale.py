"""Curvature along given vectors as it depends on the scale it is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda.arguments import positive
from lyapcuda.objective.evaluator import Closure
from lyapcuda.params.collect import Parameters
from lyapcuda.solvers.operator import HessianOperator
from lyapcuda.solvers.result import EigenResult

__all__ = ["FiniteScale", "finite_scale"]


@dataclass(frozen=True)
class FiniteScale:
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


def finite_scale(
    closure: Closure,
    params: Parameters,
    vectors: EigenResult | Tensor,
    perturbations: Sequence[float] | None = None,
    *,
    data: Iterable[Any] | None = None,
    select: str | Sequence[str] | None = None,
    weight_decay: float = 0.0,
    model: nn.Module | Iterable[nn.Module] | None = None,
) -> FiniteScale:
    """How the curvature along the found vectors depends on the scale it is measured at.

    On a smooth loss it doesn't, for small ones; kinks (ReLU) put a curvature into differences that
    the Hessian doesn't have.

    Args:
        vectors: a result of `eigsh`, or (k, n) vectors of any norm, in the parameters' order.
        perturbations: two or more separations. Default: that of the result (for vectors: the one
            advised) and a tenth and ten times of it.
        closure, params, data, select, weight_decay, model: as for `eigsh`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    options = dict(data=data, select=select, weight_decay=weight_decay, model=model)
    operator = HessianOperator(closure, params, difference="central", **options)
    rows = vectors.eigenvectors if isinstance(vectors, EigenResult) else vectors
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] != operator.shape[0]:
        described = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"vectors: expected an EigenResult or (k, {operator.shape[0]}), got {described}"
        )
    if perturbations is None:
        operator.gradient()
        middle = getattr(vectors, "perturbation", None) or operator.perturbation
        perturbations = (middle / 10.0, middle, middle * 10.0)
    sizes = list(perturbations)
    if len(sizes) < 2:
        raise ValueError(f"perturbations={perturbations!r}: expected two or more")
    for size in sizes:
        positive("perturbations", size)
    table = []
    for size in sizes:
        operator.perturbation = float(size)
        products = [(u.double(), operator.matvec(u).double()) for u in rows]
        table.append(torch.stack([(u @ y) / (u @ u) for u, y in products]))
    return FiniteScale(
        torch.tensor(sizes, dtype=torch.float64),
        torch.stack(table),
        operator.gradient_evaluations,
    )
