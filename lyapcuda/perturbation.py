"""Δq, the norm of a separation: large enough for the gradients' rounding, small for their bend."""

from __future__ import annotations

import math
import warnings

from lyapcuda.flat import FlatLayout

__all__ = ["chosen_perturbation", "default_perturbation"]


def default_perturbation(layout: FlatLayout, epsilon: float | None = None) -> float:
    """Δq for gradients computed to ``epsilon`` (default: in the parameters' precision):
    ε^(1/3)·max(‖θ‖, √N/100)/4.

    Rounding errors of a gradient difference grow as 1/Δq. Its own error is of first order in Δq,
    but of opposite sign on the two sides of θ, which the tracker visits in turns: their mean is
    left with the second order, and ε^(1/3) balances that. The second scale stands in for parameters
    that start at zero. Measured on smooth nets in bench/perturbation.py; kinks (ReLU) want a larger
    Δq still.
    """
    size = max(layout.norm(), 1e-2 * math.sqrt(layout.numel))
    epsilon = layout.epsilon() if epsilon is None else epsilon
    return epsilon ** (1.0 / 3.0) * size / 4.0


def chosen_perturbation(
    layout: FlatLayout,
    perturbation: float | None,
    epsilon: float | None = None,
    *,
    stacklevel: int = 6,
) -> float:
    """Δq: the user's, with a warning where rounding would swallow it, or the default for gradients
    computed to ``epsilon``.
    """
    advised = default_perturbation(layout, epsilon)
    if perturbation is None:
        return advised
    if perturbation < max(layout.epsilon() * layout.norm(), advised / 30.0):
        warnings.warn(
            f"perturbation={perturbation:g} is small for the parameters' precision: the difference "
            f"of gradients will be rounding for a good part; {advised:.1g} is advised"
            if epsilon is None
            else f"perturbation={perturbation:g} is small for a loss computed to {epsilon:.1g} "
            f"(autocast): {advised:.1g} is advised",
            stacklevel=stacklevel,
        )
    return perturbation
