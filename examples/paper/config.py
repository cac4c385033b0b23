"""What defines a run: every number in its CSV follows from these values and the data."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyapcuda import ops
from lyapcuda.command.problem import LOSSES

from .data import CLASSES, DIGITS, Dataset
from .models import MODELS

#: Of a tracker; with several separations those of ``OF_QUOTIENTS`` alone.
ESTIMATES = ("auto", *ops.ESTIMATES)
SCHEDULE_NAMES = ("constant", "cyclic", "qn")
# Where a run may go on differently from how it began.
_FREE_ON_RESUME = ("epochs", "max_steps", "device")


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a run, checked when made.

    Attributes:
        model: one of :data:`examples.paper.models.MODELS`.
        data: ``digits`` or a CIFAR-10 folder.
        loss: ``ce`` or ``mse``.
        schedule: ``constant``, ``cyclic`` or ``qn``.
        lr: the learning rate (constant) or its peak (cyclic).
        gain: ``lr = gain / h0`` under ``qn``.
        k: curvatures that ``qn`` uses: with more than one, each along its own eigenvector.
        cycle_epochs, cycle_ratio: length of a cycle, and its highest rate over its lowest (cyclic).
        warmup: measurements before the first step at most, at the initial weights (``qn``).
        epochs: length of the run.
        max_steps: stop after this many steps if that comes first.
        batch_size: default 128 for digits, 512 for CIFAR-10.
        weight_decay: part of the loss, and of its curvature.
        perturbation: length of the separation; default: chosen by the tracker.
        estimate: as of `lyapcuda.CurvatureTracker`; default ``growth`` under ``qn``, whose steps it
            keeps on the short side, else ``rayleigh``.
        every: measure on every n-th step (not under ``qn``, which needs every one).
        classes: labels to train on; default all ten, but planes and cars for CIFAR-10 with any
            model except resnet18, as in the paper.
        augment: random crops and flips; default for CIFAR-10, not to be had for digits.
        seed: of the initialisation and of the order of the data.
        device: a torch device; ``auto`` is cuda where there is one, else cpu.

    Raises:
        ValueError: a value out of range, naming the argument and the value.
    """

    model: str = "mlp"
    data: str = DIGITS
    loss: str = "ce"
    schedule: str = "constant"
    lr: float = 0.1
    gain: float = 1.0
    k: int = 1
    cycle_epochs: float = 4.0
    cycle_ratio: float = 10.0
    warmup: int = 100
    epochs: int = 30
    max_steps: int | None = None
    batch_size: int | None = None
    weight_decay: float = 5e-4
    perturbation: float | None = None
    estimate: str | None = None
    every: int = 1
    classes: tuple[int, ...] | None = None
    augment: bool | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("model", MODELS),
            ("loss", LOSSES),
            ("schedule", SCHEDULE_NAMES),
            ("estimate", ESTIMATES),
        ):
            value = getattr(self, name)
            if value not in choices and not (name == "estimate" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("lr", "gain", "perturbation", "cycle_epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if not (math.isfinite(self.cycle_ratio) and self.cycle_ratio >= 1):
            raise ValueError(f"cycle_ratio must be at least 1, got {self.cycle_ratio}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}")
        for name in ("epochs", "max_steps", "batch_size", "every", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2**63-1, got {self.seed}")
        if self.k > 1 and self.schedule != "qn":
            raise ValueError(f"k must be 1 with schedule={self.schedule}, got {self.k}")
        if self.k > 1 and self.estimate not in (None, *ops.OF_QUOTIENTS):
            raise ValueError(
                f"estimate must be one of {', '.join(ops.OF_QUOTIENTS)} with k={self.k}, got "
                f"{self.estimate}"
            )
        if self.schedule == "qn" and self.every != 1:
            raise ValueError(
                f"every must be 1 with schedule=qn, which needs each measurement, got {self.every}"
            )
        if self.data == DIGITS and self.augment:
            raise ValueError(
                "augment=True: the digits are too small to crop, and not to be flipped"
            )

    def default_classes(self) -> tuple[int, ...] | None:
        """The classes to load: those asked for, or the paper's, or None for all."""
        if self.classes is not None or self.data == DIGITS or self.model == "resnet18":
            return self.classes
        return (0, 1)

    def resolved(self, dataset: Dataset) -> TrainConfig:
        """The same run with every default that depends on the data or the schedule filled in."""
        digits = dataset.name == DIGITS
        return dataclasses.replace(
            self,
            classes=dataset.classes,
            batch_size=self.batch_size or (128 if digits else 512),
            augment=not digits if self.augment is None else self.augment,
            estimate=self.estimate
            or ("growth" if self.schedule == "qn" and self.k == 1 else "rayleigh"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: values that don't make a configuration.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"configuration with other fields: {sorted(names ^ set(values))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"malformed configuration: {error}") from error


def require_same(path: Path, before: TrainConfig, values: Mapping[str, Any]) -> None:
    """Compare arguments with those of the run that a checkpoint holds.

    Args:
        path: the checkpoint, for the message.
        before: its configuration.
        values: some or all arguments of the run that is to go on. Of ``data`` only the kind is
            compared: a folder may have been moved, and its rows have a fingerprint.

    Raises:
        ValueError: one would make it another run, naming it and both values.
    """
    for name, value in values.items():
        old = getattr(before, name)
        same = value == old
        if name == "data":
            same = (value == DIGITS) == (old == DIGITS)
        if not same and name not in _FREE_ON_RESUME:
            raise ValueError(f"{path}: {name} was {old} in this run, got {value}")


def classes_argument(text: str) -> tuple[int, ...]:
    """The labels that an option such as ``--classes 0,1`` or ``--classes all`` names."""
    if text == "all":
        return tuple(range(CLASSES))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers like 0,1 or all, got {text!r}"
        ) from None
