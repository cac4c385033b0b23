"""The result of `lyapcuda.eigsh`, and the warning where it isn't known to the tolerance."""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lyapcuda.arguments import described, users_level
from lyapcuda.objective.loss_graph import COARSE
from lyapcuda.params.flat import FlatLayout
from lyapcuda.plots.figure import Plotted
from lyapcuda.plots.spectrum import draw_eigenvalues
from lyapcuda.tables import aligned, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "KINKS",
    "NOT_ITS_OWN",
    "PRECISION",
    "ConvergenceWarning",
    "EigenResult",
    "jumping",
    "warn_unless_converged",
]

# What speaks against every value of a run.
KINKS = (
    "kinks: the gradient jumps beside θ (ReLU, max-pooling, routing; or arithmetic coarser than "
    "the parameters'), so differences of gradients see a curvature at their scale, "
    "see finite_scale; mode='exact' gives the pointwise one, where the loss can be differentiated "
    "twice"
)
PRECISION = (
    "precision: the gradient is computed too coarsely for differences to show its slope; take the "
    "loss in float32, outside of autocast"
)
NOT_ITS_OWN = (
    "gradient: it isn't that of the loss the closure returned, which changes by another amount "
    "along it (a stopped or replaced gradient, a scaled or clipped one): there may be no Hessian "
    "to it"
)


def jumping(epsilon: float) -> str:
    """What speaks against differences whose gradient jumps beside θ.

    Args:
        epsilon: machine epsilon of what the loss was seen to be computed in.
    """
    return KINKS if epsilon <= COARSE else PRECISION


class ConvergenceWarning(RuntimeWarning):
    """Some of the returned eigenvalues aren't known to the tolerance."""


@dataclass(frozen=True, repr=False)
class EigenResult(Plotted):
    """Eigenpairs of the Hessian, in the order of ``which``: LA and BE descend, SA ascends, LM goes
    by magnitude.

    Attributes:
        eigenvalues: (k,) float64.
        eigenvectors: (k, n), a vector a row, of norm 1, in the order of the parameters. With a
            ``preconditioner`` those of P⁻¹H, which aren't orthogonal to each other.
        residuals: (k,) float64, ‖Hu − ρu‖ of the map that was measured: were that symmetric, an
            eigenvalue of it would lie within so much. Rigorous. With a ``preconditioner`` H and u
            are P^(-1/2)·H·P^(-1/2) and its own vector.
        difference_errors: (k,) float64, an estimate of how far that map and the Hessian are apart
            along u: from the asymmetry of the projected matrix, and at least what products of this
            kind and precision have on smooth losses. Where any value would count as converged, also
            from a measurement along the leading one's vector, by differences of gradients on both
            sides of θ (`lyapcuda.solvers.difference_error`, `lyapcuda.solvers.agreement`).
        converged: (k,) bool. The error of the eigenvalue, estimated from the residuals and the gaps
            between values (R²/gap), and one and a half times that of the products are within the
            tolerance together; and the residual, which bounds the error rigorously where a gap can
            mislead (a close pair not yet told apart), is within five times of it. Or the value is
            zero within the products' error, and that is small beside ‖H‖. Lanczos asks for more:
            the residual within half of the tolerance where values are crowded, and without ``v0``
            that an overlooked eigenvalue would have shown by now, unless its vector has less than a
            tenth of a random vector's usual part in the start vector
            (`lyapcuda.solvers.missed`). Never where there are ``doubts``.
        iterations: of the method.
        gradient_evaluations: of the whole data (an exact product counts as two).
        history: per iteration ``{"eigenvalues": [...], "residuals": [...],
            "gradient_evaluations": so far}``.
        method, which, tol: as asked for.
        mode: "exact" or "difference": which products were taken.
        reason: why, in a sentence.
        difference: "forward" or "central"; "exact" where there was none.
        perturbation: Δq of the differences; with exact products, of what they were compared with.
        doubts: what speaks against every one of the values, a sentence each: products that aren't
            those of one symmetric matrix (data, generators, kinks, precision).
        epsilon: machine epsilon of the coarsest type that the loss was seen to be computed in.
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
    mode: str
    reason: str
    difference: str
    perturbation: float | None
    tol: float
    doubts: tuple[str, ...]
    epsilon: float
    _layout: FlatLayout = field(repr=False, compare=False)

    @property
    def interval(self) -> Tensor:
        """(k, 2) float64: eigenvalue ± (residual + three times the products' error).

        It promises that *some* eigenvalue of the Hessian lies in each, as far as the estimate of
        that error is right. It doesn't promise that this is the i-th largest: one that was
        overlooked may lie outside of all of them. Where there are ``doubts``, it is that of the map
        that was measured, whatever that is.
        """
        width = self.residuals + 3.0 * self.difference_errors
        return torch.stack([self.eigenvalues - width, self.eigenvalues + width], 1)

    def __repr__(self) -> str:
        return "\n".join(
            [f"EigenResult: {self.summary}", *aligned(self.table(), ">><")]
            + [f"doubt: {doubt}" for doubt in self.doubts]
        )

    def _repr_html_(self) -> str:
        doubts = "".join(f"<p>{html.escape(doubt)}</p>" for doubt in self.doubts)
        return f"{html_table(self.table())}<p>{html.escape(self.summary)}</p>{doubts}"

    @property
    def summary(self) -> str:
        """How it was found, in a line."""
        known, k = int(self.converged.sum()), len(self.converged)
        how = (
            f"exact products ({self.reason})"
            if self.mode == "exact"
            else (f"{self.difference} differences ({self.reason})")
        )
        return f"{known} of {k} to tol={self.tol:g}, {self.gradient_evaluations} gradients, {how}"

    def table(self) -> list[tuple[str, ...]]:
        """A table: its head, and a row an eigenvalue."""
        rows = [("", "eigenvalue", "some eigenvalue lies in", "converged")]
        for i, (value, (low, high), done) in enumerate(
            zip(
                self.eigenvalues.tolist(),
                self.interval.tolist(),
                self.converged.tolist(),
                strict=True,
            )
        ):
            interval = f"[{low:.6g}, {high:.6g}]"
            rows.append((str(i), f"{value:.6g}", interval, "yes" if done else "NO"))
        return rows

    def _draw(self, ax: Axes) -> None:
        draw_eigenvalues(ax, self.eigenvalues, self.interval, self.converged)

    def unflatten(self, i: int) -> list[Tensor]:
        """Eigenvector i as views shaped like the parameters, in their order."""
        if not isinstance(i, Integral) or not -len(self.eigenvectors) <= i < len(self.eigenvectors):
            raise IndexError(f"i={described(i)}: there are {len(self.eigenvectors)} eigenvectors")
        return self._layout.split(self.eigenvectors[i])


def warn_unless_converged(result: EigenResult) -> None:
    """A `ConvergenceWarning` that says what is missing, and what helps; for the caller's caller."""
    missing = result.eigenvalues.numel() - int(result.converged.sum())
    if not missing:
        return
    if result.doubts:
        advice = "; ".join(result.doubts)
    else:
        size = result.eigenvalues.abs()
        limited = (result.difference_errors > result.tol * size) & ~result.converged
        advice = _limits(result) if limited.any() else "more maxiter, a larger ncv or tol"
    warnings.warn(
        f"{missing} of {result.eigenvalues.numel()} eigenvalues aren't known to tol={result.tol:g} "
        f"after {result.iterations} iterations (see .interval); {advice}",
        ConvergenceWarning,
        stacklevel=users_level(),
    )


def _limits(result: EigenResult) -> str:
    """Why no further product makes the values better."""
    if result.epsilon > COARSE:
        return (
            f"precision: the loss is computed to {result.epsilon:.1g} (16 bits, or TF32), and its "
            "products aren't good for more: a larger tol, or the loss in float32"
        )
    if result.mode == "exact":
        return (
            "the exact products aren't good for more: they are rounded, or not symmetric; a larger "
            "tol, or float64"
        )
    better = "" if result.difference == "central" else "difference='central', "
    return (
        f"the differences themselves ({result.difference}, perturbation="
        f"{result.perturbation:.2g}) aren't good for more: {better}float64 or a larger tol"
    )
