"""The result of `lyapcuda.eigsh`, and the warning where it isn't known to the tolerance."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lyapcuda.params.flat import FlatLayout

__all__ = ["ConvergenceWarning", "EigenResult", "warn_unless_converged"]


class ConvergenceWarning(RuntimeWarning):
    """Some of the returned eigenvalues aren't known to the tolerance."""


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of the Hessian, in the order of ``which``: LA and BE descend, SA ascends, LM goes
    by magnitude.

    Attributes:
        eigenvalues: (k,) float64.
        eigenvectors: (k, n), a vector a row, of norm 1, in the order of the parameters.
        residuals: (k,) float64, ‖Hu − ρu‖ of the map that was measured: were that symmetric, an
            eigenvalue of it would lie within so much. Rigorous.
        difference_errors: (k,) float64, an estimate of how far the differences' map and the Hessian
            are apart along u: from the asymmetry of the projected matrix, and at least what
            differences of this kind and precision have on smooth losses. On a smooth loss, where
            any value would count as converged, also from a measurement along the leading one's
            vector (`lyapcuda.solvers.difference_error`), unless the ``perturbation`` was given.
        converged: (k,) bool. The error of the eigenvalue, estimated from the residuals and the gaps
            between values (R²/gap), and one and a half times that of the differences are within the
            tolerance together; and the residual, which bounds the error rigorously where a gap can
            mislead (a close pair not yet told apart), is within five times of it. Or the value is
            zero within the differences' error. Lanczos asks for more: the residual within half of
            the tolerance where values are crowded, and without ``v0`` that an overlooked eigenvalue
            would have shown by now, unless its vector has less than a hundredth of the usual part
            in the start vector, or it lies closer to a found one than ``tol`` or a tenth of their
            usual distance (`lyapcuda.solvers.missed`).
        iterations: of the method.
        gradient_evaluations: of the whole data (an exact product counts as two).
        history: per iteration ``{"eigenvalues": [...], "residuals": [...],
            "gradient_evaluations": so far}``.
        method, which, difference, perturbation, tol: how it was measured ("exact": no difference).
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    difference_errors: Tensor
    converged: Tensor
    iterations: int
    gradient_evaluations: int
    history: list[dict[str, Any]] = field(repr=False)
    method: str
    which: str
    difference: str
    perturbation: float | None
    tol: float
    _layout: FlatLayout = field(repr=False, compare=False)

    @property
    def interval(self) -> Tensor:
        """(k, 2) float64: eigenvalue ± (residual + three times the differences' error). Each holds
        an eigenvalue of the Hessian, as far as the estimate of that error is right.
        """
        width = self.residuals + 3.0 * self.difference_errors
        return torch.stack([self.eigenvalues - width, self.eigenvalues + width], 1)

    def unflatten(self, i: int) -> list[Tensor]:
        """Eigenvector i as views shaped like the parameters, in their order."""
        if not isinstance(i, Integral) or not -len(self.eigenvectors) <= i < len(self.eigenvectors):
            raise IndexError(f"i={i!r}: there are {len(self.eigenvectors)} eigenvectors")
        return self._layout.split(self.eigenvectors[i])


def warn_unless_converged(result: EigenResult) -> None:
    """A `ConvergenceWarning` that says what is missing, and what helps; for the caller's caller."""
    missing = result.eigenvalues.numel() - int(result.converged.sum())
    if not missing:
        return
    size = result.eigenvalues.abs()
    limited = (result.difference_errors > result.tol * size) & ~result.converged
    limited = limited.any() and result.difference != "exact"
    advice = (
        f"the differences themselves ({result.difference}, perturbation="
        f"{result.perturbation:.2g}) aren't good for more: difference='central' or a larger tol; "
        "on a loss with kinks (ReLU) the curvature belongs to its scale, see finite_scale"
        if limited
        else "more maxiter, a larger ncv or tol"
    )
    warnings.warn(
        f"{missing} of {result.eigenvalues.numel()} eigenvalues aren't known to tol={result.tol:g} "
        f"after {result.iterations} iterations (see .interval); {advice}",
        ConvergenceWarning,
        stacklevel=4,
    )
