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

from lyapcuda.solvers.basis import Basis, on_host
from lyapcuda.solvers.operator import HessianOperator

__all__ = ["TruncationError", "truncation_along"]


@dataclass(frozen=True)
class TruncationError:
    """Along one vector.

    Attributes:
        error: of the differences, relative to the curvature; their rounding included.
        length: the distance over which the curvature changes by as much as it is.
    """

    error: float
    length: float

    def central(self, perturbation: float) -> float:
        """The relative error that central differences at this Δq are expected to have, were the
        fourth derivative to the third as that is to the second.
        """
        return (perturbation / self.length) ** 2 / 6.0


def truncation_along(
    operator: HessianOperator, u: Basis, spare: Basis, value: float
) -> TruncationError:
    """Measures it with two gradients beside θ.

    For forward differences at the same Δq on both sides, for central
    ones at twice the Δq, where they are off four times as far.

    Args:
        u: one row, norm 1.
        spare: one row, which is overwritten.
        value: the curvature along u as the operator's differences have seen it; not 0.

    Raises:
        FloatingPointError: a gradient isn't finite.
    """
    step = operator.perturbation

    def curvature(perturbation: float) -> float:
        operator.product(u.row(0), spare.row(0), perturbation=perturbation)
        return float(on_host(u.gram(spare))[0, 0])

    if operator.difference == "central":
        error = abs(curvature(2.0 * step) - value) / (3.0 * abs(value))
        return TruncationError(error, step / math.sqrt(6.0 * error) if error else math.inf)
    plus, minus = curvature(step), curvature(-step)
    mean = (plus + minus) / 2.0
    size = abs(mean) or abs(value)
    change = abs(plus - minus) / size
    error = max(change / 2.0, abs(value - mean) / size)
    return TruncationError(error, step / change if change else math.inf)
