"""How a run chooses its learning rate. A new schedule is a class here and a name in SCHEDULES."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda import CurvatureTracker, LyapunovSGD

from .config import SCHEDULE_NAMES, TrainConfig

Closure = Callable[[], Tensor]


class Schedule(ABC):
    """Takes training steps and knows the curvature and the rate of the last one.

    Attributes:
        tracker: the :class:`lyapcuda.CurvatureTracker` behind the steps.
    """

    tracker: CurvatureTracker

    @abstractmethod
    def step(self, closure: Closure) -> Tensor:
        """Measure and step; returns the detached loss before the step, on its device."""

    @property
    @abstractmethod
    def lr(self) -> Tensor:
        """The rate used last: 0-dim float64, on the tracker's device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`."""


class Constant(Schedule):
    """Plain SGD without momentum, as in the paper, at a fixed rate."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.tracker = CurvatureTracker(
            model.parameters(),
            every=config.every,
            perturbation=config.perturbation,
            estimate=config.estimate,
            weight_decay=config.weight_decay,
            seed=config.seed,
            model=model,
        )
        self._lr = config.lr

    def step(self, closure: Closure) -> Tensor:
        loss = self.tracker.step(closure, leave_grad=True)
        self._lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        return loss

    @property
    def lr(self) -> Tensor:
        # full_like fills on the device; a tensor made from the number would be copied there.
        return torch.full_like(self.tracker.h, self._lr)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.tracker.load_state_dict(state["tracker"])


class Cyclic(Constant):
    """SGD with a triangular wave from ``lr / cycle_ratio`` to ``lr`` (Smith & Topin)."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(
            self.optimizer,
            base_lr=config.lr / config.cycle_ratio,
            max_lr=config.lr,
            step_size_up=max(1, round(config.cycle_epochs / 2 * steps_per_epoch)),
            cycle_momentum=False,
        )

    def step(self, closure: Closure) -> Tensor:
        loss = super().step(closure)
        self.scheduler.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scheduler.load_state_dict(state["scheduler"])


class QuasiNewton(Schedule):
    """The paper's own: ``lr = gain / h0``, from a smoothed h0, without momentum."""

    def __init__(self, model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> None:
        self.optimizer = LyapunovSGD(
            model.parameters(),
            gain=config.gain,
            k=config.k,
            momentum=0.0,
            weight_decay=config.weight_decay,
            perturbation=config.perturbation,
            estimate=config.estimate,
            warmup_iterations=config.warmup,
            seed=config.seed,
        )

    @property
    def tracker(self) -> CurvatureTracker:  # type: ignore[override]
        return self.optimizer.tracker

    def step(self, closure: Closure) -> Tensor:
        return self.optimizer.step(closure)

    @property
    def lr(self) -> Tensor:
        return self.optimizer.lr

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])


SCHEDULES: dict[str, Callable[[nn.Module, TrainConfig, int], Schedule]] = dict(
    zip(SCHEDULE_NAMES, (Constant, Cyclic, QuasiNewton), strict=True)
)
