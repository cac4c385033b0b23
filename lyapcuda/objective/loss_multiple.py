"""Closures that call ``backward()`` on a multiple of the loss they return: a GradScaler's, or 1/n
of it where n micro-batches are accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["AsItIs", "Multiple", "is_multiple"]

# Functions that take a loss to a multiple of it, or to another type.
_FACTORS = ("MulBackward", "DivBackward", "ToCopyBackward", "ViewBackward", "SqueezeBackward")
_LONGEST = 8


def is_multiple(root: Any, loss: Any) -> bool:
    """Whether a backward pass on ``root`` is one on a multiple of ``loss``, another than itself.

    Autograd's graph shows it. Where the loss has no graph (a float, a detached tensor), the two
    values have to be a whole number apart, or its inverse.
    """
    if not isinstance(root, Tensor) or root is loss or root.numel() != 1:
        return False
    node = getattr(root, "grad_fn", None)
    goal = getattr(loss, "grad_fn", None)
    if goal is not None:
        for _ in range(_LONGEST):
            if node is goal:
                return True
            following = [n for n, _ in node.next_functions if n is not None]
            if not node.name().startswith(_FACTORS) or len(following) != 1:
                return False
            node = following[0]
        return False
    there, here = float(root.detach()), float(loss)
    if not math.isfinite(there) or not math.isfinite(here) or here == 0.0:
        return False
    factor = there / here
    whole = max(abs(factor), 1.0 / abs(factor)) if factor else 1.0
    return factor > 0.0 and round(whole) > 1 and math.isclose(whole, round(whole), rel_tol=1e-5)


class Multiple:
    """The factor between what ``backward()`` was called on and the loss, taken out of gradients.

    It stays on the device.
    """

    def __init__(self) -> None:
        self._factor: Tensor | None = None

    def take(self, root: Any, loss: Any) -> None:
        """After a backward pass: what it was called on, None for the loss itself, and the loss."""
        self._factor = None
        if root is not None:
            there = root.detach().double().reshape(())
            here = loss.detach().to(there) if isinstance(loss, Tensor) else loss
            self._factor = there / here

    def divide_(self, gradients: Sequence[Tensor | None]) -> None:
        """Divides by it in place."""
        if self._factor is None:
            return
        inverse = self._factor.reciprocal()
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(inverse.to(gradient.device))  # (0-dim: keeps the gradient's type)


class AsItIs:
    """Leaves the factor in: for a step that doesn't depend on it (gain/h times g)."""

    in_results = gives_way = False

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss itself."""
        return loss

    def take(self) -> None:
        """Nothing to take down."""

    def divide_(self, gradients: Sequence[Tensor | None]) -> None:
        """Leaves them."""
