"""Between Lyapunov exponents and Hessian eigenvalues: the paper's relations (§3, App. A and B)."""

from __future__ import annotations

from lyapcuda import _C, ops
from lyapcuda.arguments import finite, fraction

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
    finite("exponent", exponent)
    finite("rate", rate)
    if rate == 0:
        raise ValueError(f"rate={rate}: expected a finite number other than 0")
    fraction("momentum", momentum)
    name = "paper" if linearised else "growth"
    return _C.curvature_of_growth(exponent, rate, momentum, ops.ESTIMATES[name])
