"""The spectral density of a Hessian, with its standard error (stochastic Lanczos quadrature)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import positive, whole
from lyapcuda.plots.figure import Plotted, png_of
from lyapcuda.plots.spectrum import draw_density
from lyapcuda.solvers.operator import accepts_closure
from lyapcuda.solvers.product_error import product_error
from lyapcuda.solvers.random_vectors import RandomVectors
from lyapcuda.solvers.symmetric import SymmetricOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SpectralDensity", "check_steps", "spectral_density"]


@dataclass(frozen=True, repr=False)
class SpectralDensity(Plotted):
    """How many eigenvalues lie where: a density over ``grid`` whose integral is 1.

    Attributes:
        grid: (points,) float64, eigenvalues.
        density: (points,) float64, the mean over the random vectors, smoothed by a Gaussian.
        standard_error: (points,) float64, of that mean; NaN for a single vector.
        nodes, weights: (draws, steps) float64, the quadrature of every random vector: Ritz values
            and the share of the spectrum that each stands for (rows sum to 1; steps a vector could
            not take have weight 0).
        width: the standard deviation of the Gaussian; at least the products' error.
        gradient_evaluations: what it cost.
        product_error: by how much products of the Hessian and a vector of norm 1 may be off: no
            eigenvalue's place is known any better.
        mode, reason: "exact" or "difference": which products were taken, and why.
        doubts: what speaks against all of the products, a sentence each (data, kinks, precision).
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    gradient_evaluations: int
    product_error: float
    mode: str
    reason: str
    doubts: tuple[str, ...]

    def __repr__(self) -> str:
        low, high = float(self.grid[0]), float(self.grid[-1])
        return (
            f"SpectralDensity(from {low:.4g} to {high:.4g}, {len(self.nodes)} draws, "
            f"{self.mode}, {self.gradient_evaluations} gradients)"
        )

    def _repr_png_(self) -> bytes | None:
        return png_of(lambda figure: self._draw(figure.subplots()))

    def _draw(self, ax: Axes) -> None:
        draw_density(ax, self.grid, self.density, self.standard_error)


def check_steps(steps: int) -> None:
    """Raises ValueError for what `spectral_density` can't take."""
    whole("steps", steps)
    if steps > 128:
        raise ValueError(f"steps={steps}: at most 128")


def _quadrature(operator: SymmetricOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature of the spectrum as ``start`` sees it: Lanczos with full
    reorthogonalisation, then nodes and weights of its tridiagonal matrix (Golub, Welsch 1969).
    """
    n = operator.shape[0]
    basis = start.new_zeros(min(steps, n), n)
    diagonal, beside = [], []
    # In float64: a float32 norm of ten million numbers is a thousandth off.
    basis[0] = start / torch.linalg.vector_norm(start, dtype=torch.float64).to(start.dtype)
    for j in range(len(basis)):
        w = operator @ basis[j]
        c = ops.gram(basis[: j + 1], w[None])[:, 0]
        again = ops.project_(w, basis[: j + 1], c)
        left = ops.project_(w, basis[: j + 1], again[:-1])
        diagonal.append(c[j] + again[j])
        size = left[-1].sqrt()
        scale = torch.stack(diagonal).abs().max()
        if j + 1 == len(basis) or not float(size) > 1e-6 * float(scale):
            break
        beside.append(size)
        basis[j + 1] = w / size.to(w.dtype)
    matrix = torch.diag(torch.stack(diagonal))
    if beside:
        side = torch.diag(torch.stack(beside), 1)
        matrix = matrix + side + side.T
    nodes, vectors = torch.linalg.eigh(matrix.cpu())
    padded = torch.zeros(2, steps, dtype=torch.float64)
    padded[0, : len(nodes)], padded[1, : len(nodes)] = nodes, vectors[0].square()
    return padded[0], padded[1]


@accepts_closure
def spectral_density(
    operator: SymmetricOperator,
    *,
    draws: int = 4,
    steps: int = 40,
    points: int = 1000,
    width: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Estimates the density of eigenvalues by stochastic Lanczos quadrature.

    Lin, Saad, Yang 2016; for Hessians of nets Ghorbani, Krishnan, Xiao 2019.

    Args:
        operator: the Hessian; or, as the short form, a closure and its parameters, and further
            arguments of `HessianOperator` by name.
        draws: random vectors; their spread gives the standard error.
        steps: Lanczos steps, so products, for each; N at most are taken. Memory: that many vectors.
        points: of the grid.
        width: the standard deviation of the Gaussian that stands for each node; None for 1 % of
            the range of the nodes, or the products' error, where that is larger.
        seed: of the random vectors; the global random states are not touched.

    Warns:
        ConvergenceWarning: where the products aren't those of one symmetric matrix.

    Raises:
        TypeError, ValueError: naming the argument and its value.

    Example:
        >>> p = torch.ones(4, dtype=torch.float64, requires_grad=True)
        >>> H = lyapcuda.HessianOperator(lambda: (torch.arange(4.0) * p.square()).sum(), [p])
        >>> density = spectral_density(H, draws=2)
        >>> [round(abs(x), 3) for x in density.nodes[0, :4].tolist()]
        [0.0, 2.0, 4.0, 6.0]
    """
    whole("draws", draws)
    whole("points", points)
    check_steps(steps)
    positive("width", width)
    before = operator.gradient_evaluations
    source = RandomVectors(operator, seed)
    with operator.keeping_graph():
        rows = [_quadrature(operator, source.signs(1)[0], steps) for _ in range(draws)]
        probe = source.signs(1)[0]
        off = product_error(operator, probe, operator @ probe)
    off.warn("spectral_density")
    scatter = off.across / math.sqrt(len(probe))
    nodes, weights = (torch.stack(parts) for parts in zip(*rows, strict=True))
    used = nodes[weights > 0]
    low, high = float(used.min()), float(used.max())
    if width is None:
        width = 0.01 * (high - low) or 1e-3 * max(abs(high), 1.0)
        width = max(width, scatter)
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    # Summed a node at a time: points × draws × steps numbers at once would be many.
    curves = torch.zeros(draws, points, dtype=torch.float64)
    for node, weight in zip(nodes.T, weights.T, strict=True):
        away = (grid - node[:, None]) / width
        curves += weight[:, None] * torch.exp(-0.5 * away * away)
    curves /= width * math.sqrt(2 * math.pi)
    error = curves.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(grid, math.nan)
    return SpectralDensity(
        grid,
        curves.mean(0),
        error,
        nodes,
        weights,
        width,
        operator.gradient_evaluations - before,
        scatter,
        operator.mode,
        operator.reason,
        off.doubts,
    )
