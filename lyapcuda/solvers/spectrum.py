"""The whole spectrum in two numbers or one curve: trace (Hutch++) and density (stochastic Lanczos).

Both are estimates over random vectors, and come with standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import positive, whole
from lyapcuda.objective.evaluator import Closure
from lyapcuda.params.collect import Parameters
from lyapcuda.solvers.operator import HessianOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SpectralDensity", "TraceResult", "spectral_density", "trace"]


@dataclass(frozen=True)
class TraceResult:
    """The trace of a Hessian, the sum of its eigenvalues.

    Attributes:
        trace: the estimate.
        standard_error: of the random part of it; 0 where the sketch caught everything.
        samples: products of the Hessian and a vector.
        gradient_evaluations: what they cost.
    """

    trace: float
    standard_error: float
    samples: int
    gradient_evaluations: int


@dataclass(frozen=True)
class SpectralDensity:
    """How many eigenvalues lie where: a density over ``grid`` whose integral is 1.

    Attributes:
        grid: (points,) float64, eigenvalues.
        density: (points,) float64, the mean over the random vectors, smoothed by a Gaussian.
        standard_error: (points,) float64, of that mean; NaN for a single vector.
        nodes, weights: (draws, steps) float64, the quadrature of every random vector: Ritz values
            and the share of the spectrum that each stands for (rows sum to 1; steps a vector could
            not take have weight 0).
        width: the standard deviation of the Gaussian.
        gradient_evaluations: what it cost.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    gradient_evaluations: int

    def plot(self, path: str | Path | None = None) -> Figure:
        """A figure of the density.

        Args:
            path: where to save it; the suffix chooses the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(7.0, 4.0), layout="constrained")
        self.draw(figure.add_subplot())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def draw(self, axes: Axes, color: str | None = None) -> None:
        """Draws the density on a logarithmic scale, with a band of one standard error."""
        floor = 1e-6 * float(self.density.max())
        low, high = (
            (self.density + side * self.standard_error.nan_to_num()).clamp_min(floor)
            for side in (-1, 1)
        )
        axes.fill_between(
            self.grid, low, high, color=color, alpha=0.3, linewidth=0, label="± 1 standard error"
        )
        axes.semilogy(self.grid, self.density.clamp_min(floor), color=color, label="density")
        axes.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, None))
        axes.legend()


class _Draws:
    """Random vectors of a generator of our own."""

    def __init__(self, operator: HessianOperator, seed: int) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r}: expected a whole number in 0..2**63-1")
        self._n, self._dtype = operator.shape[0], operator.dtype
        self._device = operator.device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def normal(self, count: int) -> Tensor:
        """(count, n): standard normal, so independent of each other in any n of them."""
        shape = (count, self._n)
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)

    def signs(self, count: int) -> Tensor:
        """(count, n): every element 1 or −1 with equal chance (Rademacher)."""
        shape = (count, self._n)
        bits = torch.randint(
            0, 2, shape, generator=self._generator, device=self._device, dtype=torch.int8
        )
        return bits.to(self._dtype).mul_(2).sub_(1)


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


def check_steps(steps: int) -> None:
    """Raises ValueError for what `spectral_density` can't take."""
    whole("steps", steps)
    if steps > 128:
        raise ValueError(f"steps={steps}: at most 128")


def trace(
    closure: Closure,
    params: Parameters,
    *,
    samples: int = 30,
    seed: int = 0,
    **options: Any,
) -> TraceResult:
    """The trace of the Hessian by Hutch++ (Meyer, Musco, Musco, Woodruff 2021).

    A third of the products finds a subspace that holds the largest eigenvalues, a third takes the
    trace on it exactly, and the rest estimates what is outside of it: the error falls as 1/samples
    where Hutchinson's plain mean falls as 1/√samples.

    Args:
        closure, params: as for `HessianOperator`.
        samples: products to spend, at least 6.
        seed: of the random vectors; the global random states are not touched.
        options: further arguments of `HessianOperator` (``data``, ``difference``, ``select``, …).

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    check_samples(samples)
    operator = HessianOperator(closure, params, **options)
    draws = _Draws(operator, seed)
    used = 0

    def products(panel: Tensor) -> Tensor:
        nonlocal used
        used += len(panel)
        return torch.stack([operator @ row for row in panel])

    third = min(samples // 3, operator.shape[0])
    basis = _orthonormalised(products(draws.normal(third)))
    caught = 0.0
    if len(basis):
        caught = float(ops.gram(basis, products(basis)).trace())
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
    error = float(values.std() / math.sqrt(len(values)))
    return TraceResult(caught + float(values.mean()), error, used, operator.gradient_evaluations)


def _quadrature(operator: HessianOperator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
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


def spectral_density(
    closure: Closure,
    params: Parameters,
    *,
    draws: int = 4,
    steps: int = 40,
    points: int = 1000,
    width: float | None = None,
    seed: int = 0,
    **options: Any,
) -> SpectralDensity:
    """The density of eigenvalues by stochastic Lanczos quadrature (Lin, Saad, Yang 2016; for
    Hessians of nets: Ghorbani, Krishnan, Xiao 2019).

    Args:
        closure, params: as for `HessianOperator`.
        draws: random vectors; their spread gives the standard error.
        steps: Lanczos steps, so products, for each; N at most are taken. Memory: that many vectors.
        points: of the grid.
        width: the standard deviation of the Gaussian that stands for each node; None for 1 % of
            the range of the nodes.
        seed: of the random vectors; the global random states are not touched.
        options: further arguments of `HessianOperator` (``data``, ``difference``, ``select``, …).

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """
    whole("draws", draws)
    whole("points", points)
    check_steps(steps)
    positive("width", width)
    operator = HessianOperator(closure, params, **options)
    source = _Draws(operator, seed)
    rows = [_quadrature(operator, source.signs(1)[0], steps) for _ in range(draws)]
    nodes, weights = (torch.stack(parts) for parts in zip(*rows, strict=True))
    used = nodes[weights > 0]
    low, high = float(used.min()), float(used.max())
    if width is None:
        width = 0.01 * (high - low) or 1e-3 * max(abs(high), 1.0)
    grid = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    # Summed a node at a time: points × draws × steps numbers at once would be many.
    curves = torch.zeros(draws, points, dtype=torch.float64)
    for node, weight in zip(nodes.T, weights.T, strict=True):
        away = (grid - node[:, None]) / width
        curves += weight[:, None] * torch.exp(-0.5 * away * away)
    curves /= width * math.sqrt(2 * math.pi)
    error = curves.std(0) / math.sqrt(draws) if draws > 1 else torch.full_like(grid, math.nan)
    return SpectralDensity(
        grid, curves.mean(0), error, nodes, weights, width, operator.gradient_evaluations
    )
