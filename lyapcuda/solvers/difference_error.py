"""The truncation error of finite-difference products along a vector.

(g(θ + Δq·u) − g(θ))/Δq is Hu + Δq/2·T[u, u], T the third derivative; a central difference is off by
Δq²/6 times the fourth. What that does to a vector across others makes a projected matrix
asymmetric, where a solver sees it. What it does along u itself looks like curvature: it shows at
another separation only. How large it is depends on the net, by orders of magnitude: on a ResNet-18
whose loss is nearly zero the curvature along the leading eigenvector changes by as much as it is
over a distance of 1/10,000 of ‖θ‖.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lyapcuda.basis import Basis
from lyapcuda.solvers.agreement import BEND, is_rough
from lyapcuda.solvers.operator import HessianOperator
from lyapcuda.solvers.solution import on_host

__all__ = ["TruncationError", "truncation_along"]


@dataclass(frozen=True)
class TruncationError:
    """Along one vector.

    Attributes:
        error: of the differences, relative to the curvature; their rounding included.
        length: the distance over which the curvature changes by as much as it is.
        jumps: whether the gradient seems to jump beside θ, or to be computed coarsely.
    """

    error: float
    length: float
    jumps: bool = False

    def central(self, perturbation: float) -> float:
        """The relative error that central differences at this Δq are expected to have, were the
        fourth derivative to the third as that is to the second.
        """
        return (perturbation / self.length) ** 2 / 6.0


def truncation_along(
    operator: HessianOperator,
    u: Basis,
    spare: Basis,
    value: float,
    residual: float,
    tol: float,
) -> TruncationError:
    """Measures it with two gradients beside θ; with two more where these lie far apart.

    For forward differences at the same Δq on both sides, for central ones at twice the Δq, where
    they are off four times as far. Where the whole product changes far more than the bend of a
    smooth loss accounts for, the gradient jumps.

    Args:
        u: one row, norm 1.
        spare: one row, which is overwritten.
        value: the curvature along u as the operator's differences have seen it; not 0.
        residual: ‖Hu − value·u‖ as they have seen it.
        tol: relative error that the value may have.

    Raises:
        FloatingPointError: a gradient isn't finite.
    """
    step = operator.perturbation
    one = torch.ones((), dtype=torch.float64, device=operator.device)

    def seen(perturbation: float) -> tuple[float, float]:
        """The curvature, and how far the whole product is from value·u, relative to it."""
        operator.product(u.row(0), spare.row(0), perturbation=perturbation)
        sums = torch.stack([u.gram(spare)[0, 0], spare.gram(spare)[0, 0], u.gram(u)[0, 0]])
        along, square, one = on_host(sums)
        rest = square - 2.0 * value * along + value**2 * one
        return float(along), math.sqrt(max(float(rest) - residual**2, 0.0)) / abs(value)

    if operator.difference == "central":
        curvature, spread = seen(2.0 * step)
        error = abs(curvature - value) / (3.0 * abs(value))
        length = step / math.sqrt(6.0 * error) if error else math.inf
        moved = float(operator.products.length_of(u.row(0), one))
        noise = operator.products.rounding * moved / (step * abs(value))
        jump = is_rough(spread, noise, tol) and seen(step / 2.0)[1] > BEND * spread
        return TruncationError(max(error, spread) if jump else error, length, jump)
    found = operator.compared(u, None, one, size=step)
    plus, minus = found.along
    mean = (plus + minus) / 2.0
    size = abs(mean) or abs(value)
    change = abs(plus - minus) / size
    error = max(change / 2.0, abs(value - mean) / size)
    jump = found.is_rough(tol)
    if jump:
        jump = operator.compared(u, None, one, size=step / 4.0).spread > BEND * found.spread
    length = step / change if change else math.inf
    return TruncationError(max(error, found.spread) if jump else error, length, jump)
