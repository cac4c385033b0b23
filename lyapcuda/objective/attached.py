"""A tracker inside ``optimizer.step(closure)``: what measures there, and at which θ."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.arguments import users_level
from lyapcuda.objective.entry import untraced
from lyapcuda.objective.evaluator import Closure
from lyapcuda.objective.pointing import at_a_copy
from lyapcuda.params.flat import squared_norm
from lyapcuda.params.shards import any_sharded

__all__ = ["StepHook"]

_WITHOUT_CLOSURE = (
    "optimizer.step() was called without a closure, but the CurvatureTracker attached needs\n"
    "optimizer.step(closure). Or don't attach: call tracker.backward(closure) before it; with a "
    "GradScaler\ntracker.step(closure, leave_grad=True, scaler=scaler), then scaler.step(optimizer)"
)

_VERSION = operator.attrgetter("_version")


class _Tracker(Protocol):
    """What is attached."""

    due: bool
    parameters: list[Tensor]

    def step(self, closure: Closure, **options: Any) -> Tensor | None: ...

    def step_inside(
        self, closure: Closure, measure: Closure | None, scaler: torch.amp.GradScaler | None
    ) -> Tensor | None: ...


class StepHook:
    """A step pre-hook that has the closure's first evaluation measured.

    An optimizer that moves θ before that evaluation (SAM) is seen to do so at the first step, which
    isn't measured; from then on the measurement is taken before the optimizer begins.

    Args:
        tracker: measures.
        notice: called with the optimizer's parameters, as a step begins.
        measure: a closure of a part of the minibatch, to measure the curvature of; None: of all.
        scaler: as of the tracker's `step`.
    """

    def __init__(
        self,
        tracker: _Tracker,
        notice: Callable[[Iterable[Tensor]], None],
        measure: Closure | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.tracker, self._notice = tracker, notice
        self._measure, self._scaler = measure, scaler
        self._looked = self._moves_first = False
        self._handed_on: Callable[[], Closure | None] = lambda: None

    @untraced
    def __call__(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # (Hooks see the optimizer as args[0].)
        self._notice(p for group in optimizer.param_groups for p in group["params"])
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A step may call that of its base class, whose hooks are the same, with or without it. The
        # closure handed on lives as long as the step that it was handed on to.
        if closure is None and self._handed_on() is None:
            raise ValueError(_WITHOUT_CLOSURE)
        if closure is None or self.tracker in getattr(closure, "trackers", ()):
            return args, kwargs
        handed_on = self._measured(optimizer, closure)
        handed_on.trackers = (self.tracker, *getattr(closure, "trackers", ()))
        self._handed_on = weakref.ref(handed_on)
        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, handed_on, *args[2:]), others

    def _measured(self, optimizer: Optimizer, closure: Closure) -> Closure:
        """The closure to hand on: its first evaluation is measured, or it was just now."""
        tracker, start = self.tracker, None
        if self._moves_first:
            part = closure if self._measure is None else self._measure
            tracker.step(part, scaler=self._scaler)
        elif tracker.due:
            start = _StepStart(tracker.parameters, closely=not self._looked)
            self._looked = True
        done = self._moves_first

        def measured_closure() -> Tensor | float | None:
            nonlocal done
            # A line search evaluates again, another tracker's copy elsewhere: not for us.
            if done or at_a_copy():
                return closure()
            done = True
            if start is not None and start.moved():
                self._moves_first = True
                warnings.warn(_moves_first(optimizer), stacklevel=users_level())
                return closure()
            return tracker.step_inside(closure, self._measure, self._scaler)

        return measured_closure


class _StepStart:
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
        norms = [squared_norm(p.detach()) for p in self._parameters]
        return versions, [value.hex() for value in norms]  # (as text: NaN is itself)

    @untraced
    def moved(self) -> bool:
        """Whether something has written to them since."""
        return self._look() != self._before


def _moves_first(optimizer: Optimizer) -> str:
    """What is said where an optimizer moves the parameters before it evaluates the closure."""
    return (
        f"{type(optimizer).__name__} moves the parameters before it evaluates the closure (as SAM "
        "does): this\nstep isn't measured; from the next one on the attached CurvatureTracker "
        "measures before the\noptimizer moves them, at one gradient more a step (docs/tracking.md)"
    )
