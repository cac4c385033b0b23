"""A loss whose Hessian is wanted: a model, its data and its loss function, each by name."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import LOSSES, TrainConfig
from .data import Dataset, Split
from .data import load as load_data
from .models import MODELS, build
from .train import saved_config

__all__ = ["Problem", "from_checkpoint", "from_names", "resolve"]

_BATCH = 1024  # of the built-in data: the mean over all of it is what counts


@dataclass(frozen=True)
class Problem:
    """loss(model(inputs), targets), averaged over ``batches`` of (inputs, targets).

    Attributes:
        model, loss, batches: the parts.
        weight_decay: counts as part of the loss.
        names: what each part was called, for reports.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batches: Iterable[Any]
    weight_decay: float
    names: dict[str, str]

    def closure(self, batch: Any) -> Tensor:
        """The loss of one batch."""
        try:
            inputs, targets = batch
        except (TypeError, ValueError):
            raise ValueError(
                f"data: expected batches of (inputs, targets), got a {type(batch).__name__}"
            ) from None
        return self.loss(self.model(inputs), targets)


def resolve(argument: str, path: str) -> Any:
    """The object that ``package.module:name`` or ``folder/file.py:name`` names.

    Raises:
        ValueError: there is none; names ``argument`` and the path.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ValueError(f"{argument}={path!r}: expected package.module:name or file.py:name")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, name)
        if os.getcwd() not in sys.path:  # a console script's path lacks it
            sys.path.insert(0, os.getcwd())
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{argument}={path!r}: can't be loaded: {error}") from error


def _called(argument: str, path: str) -> Any:
    factory = resolve(argument, path)
    if not callable(factory):
        raise ValueError(f"{argument}={path!r}: a {type(factory).__name__}, expected a function")
    return factory()


def _built_in_batches(dataset: Dataset, samples: int | None) -> list[tuple[Tensor, Tensor]]:
    split: Split = dataset.train
    count = len(split) if samples is None else min(samples, len(split))
    rows = range(0, count, _BATCH)
    return [
        (
            dataset.standardise(split.images[i : min(i + _BATCH, count)]),
            split.labels[i : min(i + _BATCH, count)],
        )
        for i in rows
    ]


def _loss(name: str) -> Callable[[Any, Any], Tensor]:
    return LOSSES[name] if name in LOSSES else resolve("loss", name)


def from_names(
    model: str,
    data: str,
    loss: str = "ce",
    *,
    classes: tuple[int, ...] | None = None,
    samples: int | None = None,
    weights: Path | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Puts a problem together.

    Args:
        model: one of :data:`examples.paper.models.MODELS` (in evaluation mode), or
            ``package.module:factory``, a function of no arguments that returns a module, in the
            mode that it is to be measured in.
        data: ``digits``, a CIFAR-10 folder, or ``package.module:factory``, a function of no
            arguments that returns an iterable of (inputs, targets), the same at every pass.
        loss: ``ce``, ``mse`` or ``package.module:function`` of (outputs, targets).
        classes: labels of the built-in data to keep; None for those that ``lyapcuda train`` takes.
        samples: only the first so many rows of the built-in data.
        weights: a state_dict for the model, loaded with weights_only=True.
        weight_decay: counts as part of the loss.
        seed: of the initialisation of a built-in model.
        device: a torch device for built-in data and the model.

    Raises:
        ValueError, OSError: naming the argument and its value.
    """
    own_data = ":" in data and not Path(data).exists()
    if classes is None and not own_data and model in MODELS:
        classes = TrainConfig(model=model, data=data).default_classes()
    dataset = None if own_data else load_data(data, classes)
    if dataset is None and model in MODELS:
        raise ValueError(
            f"model={model!r}: the built-in models are for the built-in data, not {data!r}; name a "
            "factory"
        )
    if model in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            shape = (dataset.in_channels, dataset.image_size, len(dataset.classes))
            module = build(model, *shape).eval()
    else:
        module = _called("model", model)
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"model={model!r}: returned a {type(module).__name__}, expected a torch.nn.Module"
            )
    if weights is not None:
        module.load_state_dict(_state_dict(weights))
    module = module.to(device)
    batches = (
        _called("data", data) if dataset is None else _built_in_batches(dataset.to(device), samples)
    )
    names = {"model": model, "data": data, "loss": loss}
    return Problem(module, _loss(loss), batches, weight_decay, names)


def _state_dict(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable state_dict: {reason}") from error


def from_checkpoint(path: Path, *, samples: int | None = None, device: str = "cpu") -> Problem:
    """What a run of ``lyapcuda train`` had come to: its model, data, loss and weight decay.

    Raises:
        ValueError, OSError: not a checkpoint, or its data are gone.
    """
    saved = checkpoint.load(path)
    config: TrainConfig = saved_config(path, saved)
    dataset = load_data(config.data, config.classes)
    config = config.resolved(dataset)
    shape = (dataset.in_channels, dataset.image_size, len(dataset.classes))
    model = build(config.model, *shape)
    model.load_state_dict(saved["model"])
    names = {"model": f"{config.model} of {path}", "data": config.data, "loss": config.loss}
    return Problem(
        model.to(device).eval(),
        LOSSES[config.loss],
        _built_in_batches(dataset.to(device), samples),
        config.weight_decay,
        names,
    )
