"""Whether a gradient is that of the loss beside it: the loss has to change along it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["check_own_gradient"]

# The loss's change may be off by so much of what the gradient says.
_OFF = 0.1
# At how many distances, each an eighth of the last, it is asked at most, and at how many in a row
# the answer has to be the same, but for so much: a loss that bends there gives another each time.
_ROUNDS, _AGREEING, _ALIKE = 8, 3, 0.05

#: L(θ + t·g/‖g‖) − L(θ − t·g/‖g‖); what the gradient says it is; how far the mean of both is from
#: L(θ); the largest of the three, in size. For a t.
Slope = Callable[[float], tuple[float, float, float, float]]


def check_own_gradient(slope: Slope, size: float, epsilon: float) -> None:
    """Raises a RuntimeError where a loss changes along its gradient by another amount than it says.

    What rounding or the loss's own curvature could explain passes: BatchNorm of few samples bends a
    loss within a thousandth of its parameters' norm, symmetrically or not.

    Args:
        slope: takes two forward passes.
        size: the distance from θ to begin with.
        epsilon: machine epsilon of the type that the loss is computed in.
    """
    shares: list[float] = []
    for _ in range(_ROUNDS):
        seen, expected, bend, largest = slope(size)
        noise = 8.0 * epsilon * largest
        if not math.isfinite(seen + expected + bend) or expected <= 0.0:
            return
        if abs(seen - expected) <= _OFF * expected + 2.0 * bend + noise:
            return
        shares.append(seen / expected)
        last = shares[-_AGREEING:]
        alike = _ALIKE * max(map(abs, last)) + noise / expected
        if len(last) == _AGREEING and max(last) - min(last) <= alike:
            raise RuntimeError(_complaint(shares[-1]))
        size /= 8.0


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
