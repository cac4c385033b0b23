"""What a solver starts from: random vectors and g(θ), the user's, or what a coarser run found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyapcuda.arguments import described
from lyapcuda.basis import Basis
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["fill_", "refill_", "start_vectors"]


def start_vectors(v0: Any, operator: SymmetricOperator) -> Basis:
    """The user's, of norm 1, a row each.

    Args:
        v0: (n,) or (m, n) real, a tensor or an array; one vector as a list of tensors of the
            parameters' shapes; or a tracker of the same parameters, whose separations they are.

    Raises:
        TypeError, ValueError: something else, naming it.
    """
    layout, (n, _) = operator.layout, operator.shape
    if isinstance(v0, np.ndarray) and v0.dtype.kind in "fiu":
        v0 = torch.as_tensor(v0, dtype=operator.dtype, device=operator.device)
    if hasattr(type(v0), "separations") and hasattr(v0, "parameters"):
        rows = [_flat(vector, operator, "this tracker follows") for vector in _separations_of(v0)]
    elif isinstance(v0, list | tuple) and all(isinstance(part, Tensor) for part in v0):
        rows = [_flat(v0, operator, f"{described(v0)} is of")]
    elif not isinstance(v0, Tensor) or v0.is_complex() or v0.shape[-1:] != (n,) or v0.dim() > 2:
        raise ValueError(
            f"v0: expected a real tensor of shape ({n},) or (m, {n}), or a tracker of these "
            f"parameters, got {described(v0)}"
        )
    else:
        rows = list(v0.detach().reshape(-1, n))
    starts = Basis.empty(layout, len(rows))
    for i, vector in enumerate(rows):
        row = operator.coordinates(vector)
        norm = float(torch.linalg.vector_norm(row, dtype=torch.float64))
        if not 0 < norm < math.inf:
            raise ValueError(f"v0: its norm is {norm}, expected a finite vector other than 0")
        layout.scatter(row / norm, starts.row(i))
    return starts


def _separations_of(tracker: Any) -> list[list[Tensor]]:
    # (`separations` would make them.)
    if not bool((tracker.steps > 0).all()):
        raise ValueError("v0: this tracker hasn't measured anything yet")
    return tracker.separations.vectors()


def _flat(vector: Sequence[Tensor], operator: SymmetricOperator, what: str) -> Tensor:
    """One vector shaped like the parameters, as a flat one; ``what`` has it, for the message."""
    shapes = [p.tensor.shape for p in operator.layout.parameters]
    if [part.shape for part in vector] != shapes:
        raise ValueError(
            f"v0: {what} {len(vector)} other parameters than the {len(shapes)} of this operator"
        )
    return torch.cat([part.detach().reshape(-1).to(operator.dtype) for part in vector])


def fill_(basis: Basis, operator: SymmetricOperator, generators: Sequence[torch.Generator]) -> None:
    """Random vectors in every row; the first one mixed half and half with what the operator starts
    from, of a Hessian g(θ).

    Half of it is known to matter, half makes sure that nothing is left out.
    """
    first = basis[:1]
    operator.start(first.row(0))
    square = first.gram(first)[0, 0]
    gradient = [row.clone() for row in first.row(0)]
    for i in range(len(basis)):
        basis.randomise_(i, generators)
    random = first.gram(first)[0, 0]
    scale = torch.where(square > 0, (random / square).sqrt(), 0.0)
    for row, part in zip(first.row(0), gradient, strict=True):
        row.addcmul_(part, scale.to(row.device, row.dtype))
    first.orthogonalise_(0)


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
    found = found if starts == 1 else found[: min(len(found), starts)]
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
