"""What a solver starts from: random vectors and g(θ), the user's, or what a coarser run found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.solvers.basis import Basis
from lyapcuda.solvers.operator import HessianOperator

__all__ = ["fill_", "refill_", "start_vector"]


def start_vector(v0: Any, operator: HessianOperator) -> Tensor:
    """The user's, of norm 1; ValueError otherwise."""
    if not isinstance(v0, Tensor) or v0.shape != operator.shape[:1] or v0.is_complex():
        described = tuple(v0.shape) if isinstance(v0, Tensor) else type(v0).__name__
        raise ValueError(
            f"v0: expected a real tensor of shape {operator.shape[:1]}, got {described}"
        )
    norm = float(v0.detach().double().norm())
    if not 0 < norm < math.inf:
        raise ValueError(f"v0: its norm is {norm}, expected a finite vector other than 0")
    return v0.detach().double() / norm


def fill_(
    basis: Basis,
    start: Tensor | None,
    operator: HessianOperator,
    generators: Sequence[torch.Generator],
) -> None:
    """Random vectors in every row, the start vector in the first."""
    for i in range(len(basis)):
        basis.randomise_(i, generators)
    first = basis[:1]
    if start is not None:
        operator.layout.scatter(start, basis.row(0))
    elif operator.mode == "difference":
        # Half of it is known to matter, half makes sure that nothing is left out.
        gradient = operator.gradient()
        square = sum(_square(part).to(operator.device) for part in gradient)
        random = first.gram(first)[0, 0]
        scale = torch.where(square > 0, (random / square).sqrt(), 0.0)
        for row, part in zip(basis.row(0), gradient, strict=True):
            row.addcmul_(part.to(row.dtype), scale.to(row.device, row.dtype))
    first.orthogonalise_(0)


def _square(part: Tensor) -> Tensor:
    if part.dtype in (torch.float32, torch.float64):
        return ops.gram(part[None], part[None])[0, 0]
    return torch.linalg.vector_norm(part, dtype=torch.float64).square()


def refill_(
    basis: Basis,
    starts: int,
    found: Basis,
    generators: Sequence[torch.Generator],
    random: bool,
) -> None:
    """Starts from vectors of norm 1 that were ``found``, which may be the first rows themselves.

    Args:
        starts: rows to fill: one, with the sum of them and (``random``) as much of a random vector;
            or as many as were found, or more, which get a random vector each.
    """
    device = basis.panels[0].device
    k, first = len(found), basis[:1]
    if starts == 1:
        weights = torch.full((k, 1), k**-0.5, dtype=torch.float64, device=device)
        first.combine_(found, weights)
        if random and len(basis) > 1:
            basis.randomise_(1, generators)
            norm = basis[1:2].gram(basis[1:2])[0, 0].sqrt()
            first.combine_(basis[:2], torch.stack([torch.ones_like(norm), 1.0 / norm])[:, None])
        first.orthogonalise_(0)
        return
    basis[:k].combine_(found, torch.eye(k, dtype=torch.float64, device=device))
    for i in range(k, starts):
        basis.randomise_(i, generators)
