"""Between Lyapunov exponents and Hessian eigenvalues: the paper's relations (§3, App. A and B)."""

from __future__ import annotations

import math

from lyapcuda import _C, ops

__all__ = ["curvature_of_growth"]


def curvature_of_growth(
    exponent: float, rate: float, *, momentum: float = 0.0, linearised: bool = False
) -> float:
    """The Hessian eigenvalue along which a map grows by e^exponent a step.

    Args:
        exponent: λ, the Lyapunov exponent per step (natural logarithm).
        rate: β > 0 for gradient ascent, −α for descent with learning rate α.
        momentum: m of the heavy-ball map p ← m·p ∓ g, θ ← θ + rate·p; 0 for the plain one.
        linearised: the paper's formulas (h = λ/rate; with momentum (λ² + λ(1 − m))/rate, App. B),
            which hold for small λ, rather than the exact (e^λ − 1)(e^λ − m)/(rate·e^λ).

    Raises:
        ValueError: rate 0 or not finite, momentum outside [0, 1).
    """
    if not (math.isfinite(rate) and rate != 0):
        raise ValueError(f"rate={rate!r}: expected a finite number other than 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: expected a number in [0, 1)")
    name = "paper" if linearised else "growth"
    return _C.curvature_of_growth(exponent, rate, momentum, ops.ESTIMATES[name])
