"""Whether a gradient is that of the loss beside it: the loss has to change along it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["check_own_gradient"]

# The loss's change may be off by so much of what the gradient says.
_OFF = 0.1
# How often the distance is made an eighth where the loss bends too much to tell.
_ROUNDS = 4

#: L(θ + t·g/‖g‖) − L(θ − t·g/‖g‖); what the gradient says it is; how far the mean of both is from
#: L(θ); the largest of the three, in size. For a t.
Slope = Callable[[float], tuple[float, float, float, float]]


def check_own_gradient(slope: Slope, size: float, epsilon: float) -> None:
    """Raises a RuntimeError where a loss changes along its gradient by another amount than it says.

    What rounding or the loss's own curvature could explain passes.

    Args:
        slope: takes two forward passes.
        size: the distance from θ to begin with.
        epsilon: machine epsilon of the type that the loss is computed in.
    """
    for _ in range(_ROUNDS):
        seen, expected, bend, largest = slope(size)
        noise = 8.0 * epsilon * largest
        if not math.isfinite(seen + expected + bend) or expected <= 0.0:
            return
        if abs(seen - expected) <= _OFF * expected + 2.0 * bend + noise:
            return
        if 2.0 * bend <= _OFF * max(abs(seen), noise):
            break
        size /= 8.0
    raise RuntimeError(_complaint(seen / expected))


def _complaint(share: float) -> str:
    held = "a part is held constant (detach, a target, straight-through): compute it outside"
    if abs(share) < 1e-6:
        reason = (
            "it is computed from detached, cached or rounded tensors, or was before the call: run "
            "the whole forward pass inside the closure"
        )
    elif 0 < share < 0.02:
        reason = "the gradient is scaled: pass scaler=, or return the loss that was scaled"
    else:
        reason = (
            "backward() was called on something else (loss / n), hooks change gradients, or " + held
        )
    return (
        f"closure: its loss changes {share:.3g} times as much as its gradient says, so this would "
        f"be another function's curvature:\n{reason};\nor measure that with debug=False"
    )
