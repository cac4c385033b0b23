"""What an optimizer does before it evaluates the closure that ``optimizer.step`` was given."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.params.shards import any_sharded

__all__ = ["WITHOUT_CLOSURE", "StepStart", "moves_first"]

WITHOUT_CLOSURE = (
    "optimizer.step() was called without a closure, but the CurvatureTracker attached needs\n"
    "optimizer.step(closure). Or don't attach: call tracker.backward(closure) before it; with a "
    "GradScaler\ntracker.step(closure, leave_grad=True, scaler=scaler), then scaler.step(optimizer)"
)

_VERSION = operator.attrgetter("_version")


class StepStart:
    """Where parameters are as an optimizer's step begins; tells later whether they have moved.

    Args:
        parameters: of the optimizer, or some of them.
        closely: look at their norms too, which also shows writes through ``.data``, and waits for
            the device.
    """

    def __init__(self, parameters: Sequence[Tensor], *, closely: bool) -> None:
        self._parameters = parameters
        # Of shards each rank would see its own, and go its own way.
        self._closely = closely and not any_sharded(parameters)
        self._before = self._look()

    def _look(self) -> tuple[list[int], list[str]]:
        versions = list(map(_VERSION, self._parameters))
        if not self._closely:
            return versions, []
        norm = torch.linalg.vector_norm
        norms = [float(norm(p.detach(), dtype=torch.float64)) for p in self._parameters]
        return versions, [value.hex() for value in norms]  # (as text: NaN is itself)

    def moved(self) -> bool:
        """Whether something has written to them since."""
        return self._look() != self._before


def moves_first(optimizer: Optimizer) -> str:
    """What is said where an optimizer moves the parameters before it evaluates the closure."""
    return (
        f"{type(optimizer).__name__} moves the parameters before it evaluates the closure (as SAM "
        "does): this\nstep isn't measured; from the next one on the attached CurvatureTracker "
        "measures before the\noptimizer moves them, at one gradient more a step (docs/tracking.md)"
    )
