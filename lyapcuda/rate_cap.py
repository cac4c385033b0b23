"""RateCap: an optimizer's learning rate held below the edge of stability, over any schedule."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.arguments import described, positive
from lyapcuda.params.wrapped_optimizers import attachable
from lyapcuda.running_peak import RunningPeak
from lyapcuda.tracker import CurvatureTracker

__all__ = ["RateCap"]


class RateCap:
    """Caps the rate of every ``optimizer.step()``: rate ← min(rate, c·threshold/h).

    The threshold is the optimizer's own (`CurvatureTracker.edge`): 2 for SGD, 2 + 2m with momentum
    m, (2 + 2β₁)/(1 − β₁) for Adam. Rates of all groups shrink by one factor, for the time of the
    step alone: schedulers see and change the rates that they have set. h is the tracker's, which
    rises at once and falls slowly (`lyapcuda.running_peak`), so that the rate doesn't jump between
    minibatches.

    Args:
        optimizer: the one that trains.
        tracker: ``CurvatureTracker(..., optimizer=optimizer)``. Its last measurement counts; before
            the first there is no cap. A tracker that is attached measures within the step, so it
            is the last step's.
        c: the cap in thresholds. 1 is the edge itself. docs/decisions.md says what others cost.

    Attributes:
        factor: what the last step's rates were multiplied with, at most 1 (0-dim float64, on the
            device).

    The factor is read back at every step, unless rates are tensors (``capturable=True``).

    Raises:
        TypeError, ValueError: naming the argument; a tracker that has no edge, or is of another
            optimizer.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([theta], lr=1.0)  # stable up to 2/8
        >>> tracker = CurvatureTracker([theta], optimizer=optimizer)
        >>> cap = RateCap(optimizer, tracker, c=0.9)
        >>> for _ in range(30):
        ...     optimizer.zero_grad()
        ...     loss = tracker.backward(lambda: theta[0].square() + 4.0 * theta[1].square())
        ...     optimizer.step()
        >>> round(float(cap.factor), 3), optimizer.param_groups[0]["lr"]
        (0.225, 1.0)
    """

    def __init__(self, optimizer: Optimizer, tracker: CurvatureTracker, c: float = 1.0) -> None:
        self._optimizer = attachable(optimizer)
        if not isinstance(tracker, CurvatureTracker):
            raise TypeError(f"tracker={described(tracker)}: expected a CurvatureTracker")
        if c is None:
            raise ValueError("c=None: expected a positive finite number")
        positive("c", c)
        tracker.require_edge()
        if tracker.optimizer is not self._optimizer:
            raise ValueError(
                "tracker: it was made for another optimizer: pass optimizer= to CurvatureTracker"
            )
        self.tracker, self.c = tracker, c
        device = tracker.layout.device
        self.factor = torch.ones((), dtype=torch.float64, device=device)
        self._peak = RunningPeak(device=device)
        self._scheduled: list[tuple[dict[str, Any], Any]] = []  # groups and their own rates
        self._handles = [
            tracker.register_step_hook(self._measured),
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def __repr__(self) -> str:
        """What it holds back, and by how much at present. Waits for the device."""
        kind = type(self._optimizer).__name__
        return f"RateCap({kind}, c={self.c:g}): rates times {float(self.factor):.3g}"

    def remove(self) -> None:
        """Ends it."""
        self._put_back()
        for handle in self._handles:
            handle.remove()

    def _measured(self, tracker: CurvatureTracker) -> None:
        self._peak.update(tracker.h.reshape(-1)[0])

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._put_back()  # of a step that ended in an exception
        edge = self.tracker.edge_at(self._peak.value)
        self.factor = torch.where(edge > self.c, self.c / edge, 1.0)
        factor: float | None = None
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._scheduled.append((group, rate.clone()))
                rate.mul_(self.factor.to(rate))
                continue
            factor = float(self.factor) if factor is None else factor
            self._scheduled.append((group, rate))
            group["lr"] = rate * factor
        args = tuple(self._guarded(value) if callable(value) else value for value in args)
        return args, {
            name: self._guarded(value) if callable(value) else value
            for name, value in kwargs.items()
        }

    def _after_step(self, *_: Any) -> None:
        self._put_back()

    def _guarded(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure after whose exception the rates are as scheduled."""

        @wraps(closure)
        def guarded() -> Any:
            try:
                return closure()
            except BaseException:
                self._put_back()
                raise

        return guarded

    def _put_back(self) -> None:
        for group, rate in self._scheduled:
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._scheduled = []

    def state_dict(self) -> dict[str, Any]:
        """The peak of the curvature."""
        return self._peak.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self._peak.load_state_dict(state_dict)
