"""Whether a gradient is that of the loss beside it: the loss has to change along it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lyapcuda.params.flat import pieces_of, squared_norm

__all__ = ["check_own_gradient"]

# The loss's change may be off by so much of what the gradient says.
_OFF = 0.1
# At how many distances, each an eighth of the last, it is asked at most, and at how many in a row
# the answer has to be the same, but for so much: a loss that bends there gives another each time.
_ROUNDS, _AGREEING, _ALIKE = 8, 3, 0.05


def check_own_gradient(
    loss_at: Callable[[Sequence[Tensor]], float],
    loss: float,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    epsilon: float,
) -> None:
    """Raises a RuntimeError where a loss changes along its gradient by another amount than it says.

    What rounding or the loss's own curvature could explain passes: BatchNorm of few samples bends a
    loss within a thousandth of its parameters' norm, symmetrically or not.

    Args:
        loss_at: the loss at other values of the parameters, by a forward pass.
        loss, parameters, gradients: at θ.
        epsilon: machine epsilon of the coarsest type that the loss is computed in.
    """
    own = max(torch.finfo(p.dtype).eps for p in parameters)
    epsilon = max(own, epsilon)
    slope = _Slope(loss_at, loss, parameters, gradients)
    size = own**0.4 * max(slope.extent, 1e-3)
    if not 0.0 < slope.norm < math.inf:
        return
    shares: list[float] = []
    for _ in range(_ROUNDS):
        seen, expected, bend, largest = slope.over(size)
        noise = 8.0 * epsilon * largest
        if not math.isfinite(seen + expected + bend) or expected <= 0.0:
            return
        if abs(seen - expected) <= _OFF * expected + 2.0 * bend + noise:
            return
        shares.append(seen / expected)
        last = shares[-_AGREEING:]
        most = max(map(abs, last))
        # (Of a loss that bends within every distance asked, all shares are small: noise that is
        # larger than these makes them no more alike.)
        floor = 1e-3 if epsilon == own else 0.0
        alike = _ALIKE * most + min(noise / expected, floor + 0.2 * most)
        if len(last) == _AGREEING and max(last) - min(last) <= alike:
            raise RuntimeError(_complaint(shares[-1]))
        size /= 8.0


class _Slope:
    """How a loss changes along its gradient.

    Arguments as of `check_own_gradient`.

    Attributes:
        norm: of the gradient.
        extent: the norm of the parameters that have one.
    """

    def __init__(
        self,
        loss_at: Callable[[Sequence[Tensor]], float],
        loss: float,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        self._loss_at, self._loss = loss_at, loss
        self._pairs = [
            (p.detach(), None if g is None else g.detach())
            for p, g in zip(parameters, gradients, strict=True)
        ]
        squares = [(squared_norm(g), squared_norm(p)) for p, g in self._pairs if g is not None]
        self.norm, self.extent = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
        self._copies = [torch.empty_like(p) for p, _ in self._pairs]

    def over(self, t: float) -> tuple[float, float, float, float]:
        """L(θ + t·g/‖g‖) − L(θ − t·g/‖g‖); what the gradient says it is; how far their mean is from
        L(θ); the largest of the three, in size.
        """
        (up, more), (down, less) = self._at(t), self._at(-t)
        largest = max(abs(up), abs(down), abs(self._loss))
        return up - down, more - less, abs(0.5 * (up + down) - self._loss), largest

    def _at(self, t: float) -> tuple[float, float]:
        """L(θ + t·g/‖g‖), and what the gradient says it has changed by on the way."""
        told = 0.0
        with torch.no_grad():
            for (p, g), copy in zip(self._pairs, self._copies, strict=True):
                copy.copy_(p)
                if g is not None:
                    copy.add_(g, alpha=t / self.norm)
                    # (16 bits don't show all of the way.)
                    told += float(
                        sum(
                            (slope.double() * (there.double() - here.double())).sum()
                            for slope, there, here in pieces_of(g, copy, p)
                        )
                    )
        return self._loss_at(self._copies), told


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
