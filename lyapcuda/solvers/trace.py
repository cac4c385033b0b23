"""The trace of a Hessian, with its standard error (Hutch++)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import whole
from lyapcuda.solvers.operator import accepts_closure
from lyapcuda.solvers.product_error import product_error, with_asymmetry
from lyapcuda.solvers.random_vectors import RandomVectors
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["TraceResult", "check_samples", "trace"]


@dataclass(frozen=True, repr=False)
class TraceResult:
    """The trace of a Hessian, the sum of its eigenvalues.

    Attributes:
        trace: the estimate.
        standard_error: of the random part of it, and of the products.
        samples: products of the Hessian and a vector.
        gradient_evaluations: what they cost.
        product_error: what of `standard_error` is that of the products: 0 for exact ones but for
            rounding; of differences how they change with Δq and from one side of θ to the other.
        mode, reason: "exact" or "difference": which products were taken, and why.
        doubts: what speaks against all of the products, a sentence each (data, kinks, precision).
    """

    trace: float
    standard_error: float
    samples: int
    gradient_evaluations: int
    product_error: float
    mode: str
    reason: str
    doubts: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"TraceResult({self.trace:.6g} ± {self.standard_error:.2g}, {self.mode}, "
            f"{self.gradient_evaluations} gradients)"
        )


def _orthonormalised(panel: Tensor) -> Tensor:
    """An orthonormal basis of the rows' span, as rows: twice through the eigenvectors of the Gram
    matrix, so that dependent rows drop out.
    """
    for _ in range(2):
        gram = ops.gram(panel, panel)
        values, vectors = torch.linalg.eigh(gram)
        kept = values > 1e-10 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
        if not bool(kept.any()):
            return panel[:0]
        turn = vectors[:, kept] / values[kept].sqrt()
        basis = panel.new_empty(turn.shape[1], panel.shape[1])
        ops.combine_(basis, panel, turn)
        panel = basis
    return panel


def check_samples(samples: int) -> None:
    """Raises ValueError for what `trace` can't take."""
    whole("samples", samples)
    if samples < 6:
        raise ValueError(f"samples={samples!r}: expected at least 6")


@accepts_closure
def trace(
    operator: SymmetricOperator,
    *,
    samples: int = 30,
    seed: int = 0,
) -> TraceResult:
    """Estimates the trace of the Hessian by Hutch++ (Meyer, Musco, Musco, Woodruff 2021).

    A third of the products finds a subspace that holds the largest eigenvalues, a third takes the
    trace on it exactly, and the rest estimates what is outside of it: the error falls as 1/samples
    where Hutchinson's plain mean falls as 1/√samples.

    Args:
        operator: the Hessian; or, as the short form, a closure and its parameters, and further
            arguments of `HessianOperator` by name.
        samples: products to spend, at least 6; of differences, two more show how far they are off.
        seed: of the random vectors; the global random states are not touched.

    Warns:
        ConvergenceWarning: where the products aren't those of one symmetric matrix.

    Raises:
        TypeError, ValueError: naming the argument and its value.

    Example:
        >>> p = torch.ones(4, dtype=torch.float64, requires_grad=True)
        >>> H = lyapcuda.HessianOperator(lambda: (torch.arange(4.0) * p.square()).sum(), [p])
        >>> round(trace(H, samples=12).trace, 4)
        12.0
    """
    check_samples(samples)
    before = operator.gradient_evaluations
    draws = RandomVectors(operator, seed)
    used = 0

    def products(panel: Tensor) -> Tensor:
        nonlocal used
        used += len(panel)
        return (operator @ panel.T).T.contiguous()

    third = min(samples // 3, operator.shape[0])
    start = draws.normal(third)
    sketch = products(start)
    off = product_error(operator, start[0], sketch[0])
    basis = _orthonormalised(sketch)
    caught = 0.0
    if len(basis):
        inside = ops.gram(basis, products(basis))
        caught, off = float(inside.trace()), with_asymmetry(off, operator, inside)
    rest = draws.signs(samples - used)
    if len(basis):
        for _ in range(2):
            inside = ops.gram(basis, rest)
            shadow = torch.empty_like(rest)
            ops.combine_(shadow, basis, inside)
            rest -= shadow
    # Where the basis spans everything, nothing is left but rounding.
    values = torch.zeros(len(rest), dtype=torch.float64)
    if len(basis) < operator.shape[0]:
        values = ops.gram(rest, products(rest)).diagonal().cpu()
    random = float(values.std() / math.sqrt(len(values)))
    off.warn("trace")
    return TraceResult(
        caught + float(values.mean()),
        math.hypot(random, off.along),
        used,
        operator.gradient_evaluations - before,
        off.along,
        operator.mode,
        operator.reason,
        off.doubts,
    )
