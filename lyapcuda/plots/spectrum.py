"""What the solvers find: eigenvalues with their intervals, a density, curvature by scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyapcuda.plots.figure import BLUE, GREEN, RED, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

__all__ = ["draw_density", "draw_eigenvalues", "draw_scales"]


def draw_eigenvalues(ax: Axes, values: Tensor, interval: Tensor, converged: Tensor) -> None:
    """Draws eigenvalues by their number; those that aren't known to the tolerance apart.

    Args:
        ax: to draw on.
        values: (k,).
        interval: (k, 2), some eigenvalue lies within.
        converged: (k,) bool.
    """
    for colour, label, chosen in (
        (BLUE, "eigenvalue, in its interval", converged),
        (RED, "not converged", ~converged),
    ):
        if chosen.any():
            where, value = chosen.nonzero()[:, 0], values[chosen]
            reach = (interval[chosen] - value[:, None]).abs().T
            marks = {"fmt": "o", "markersize": 5, "capsize": 3, "color": colour}
            ax.errorbar(where, value, yerr=reach, label=label, **marks)
    ax.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    ax.set(xlabel="number", ylabel="eigenvalue")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)


def draw_density(
    ax: Axes, grid: Tensor, density: Tensor, error: Tensor, color: str | None = None
) -> None:
    """Draws a density on a logarithmic scale, with a band of one standard error.

    Args:
        ax: to draw on.
        grid, density, error: (points,); the error may be NaN.
        color: of both; None for green.
    """
    color = GREEN if color is None else color
    floor = 1e-6 * float(density.max())
    low, high = ((density + side * error.nan_to_num()).clamp_min(floor) for side in (-1, 1))
    band = {"color": color, "alpha": 0.3, "linewidth": 0}
    ax.fill_between(grid, low, high, label="± 1 standard error", **band)
    ax.semilogy(grid, density.clamp_min(floor), color=color, label="density")
    ax.set(xlabel="eigenvalue", ylabel="density of eigenvalues", ylim=(floor, None))
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)


def draw_scales(ax: Axes, perturbations: Tensor, curvatures: Tensor) -> None:
    """Draws the curvature along vectors over the scale Δq at which it is measured.

    Args:
        ax: to draw on.
        perturbations: (s,).
        curvatures: (s, k), a line a vector.
    """
    for i, column in enumerate(curvatures.unbind(1)):
        ax.plot(perturbations, column, "o-", linewidth=1.2, markersize=4, label=f"vector {i}")
    ax.set(xscale="log", xlabel="Δq, the distance of the difference", ylabel="curvature")
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)
