"""``python -m examples.paper eigs``: of a run's checkpoint, or of a model before its training."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lyapcuda.command.eigs import add_measurement, measure
from lyapcuda.command.problem import LOSSES, Problem
from lyapcuda.command.weights import load_weights

from . import checkpoint
from .config import TrainConfig, classes_argument
from .data import DIGITS, Dataset, load
from .models import MODELS, build
from .train import saved_config

_BATCH = 1024  # the mean over all of the rows is what counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Eigenvalues of the Hessian of a model's loss over the training rows; prints a table, and "
        "with --out writes eigs.json and eigs.png."
    )
    add = parser.add_argument
    add("--model", default="mlp", choices=MODELS, help="default mlp")
    add("--data", default=DIGITS, metavar="digits|DIR", help="digits (default) or CIFAR-10")
    add("--loss", default="ce", choices=LOSSES, help="default ce")
    add("--checkpoint", type=Path, metavar="PATH", help="all of these from a checkpoint.pt")
    add("--samples", type=int, metavar="N", help="only the first N rows")
    add("--classes", type=classes_argument, metavar="A,B,...|all", help="default as in the paper")
    add_measurement(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.samples is not None and arguments.samples < 1:
        raise ValueError(f"samples must be at least 1, got {arguments.samples}")

    def problem(device: str) -> Problem:
        if arguments.checkpoint is not None:
            return from_checkpoint(arguments.checkpoint, arguments.samples, device)
        return _at_the_start(arguments, device)

    return measure(problem, arguments)


def from_checkpoint(path: Path, samples: int | None = None, device: str = "cpu") -> Problem:
    """What a training run had come to: its model, data, loss and weight decay.

    Raises:
        ValueError, OSError: not a checkpoint, or its data are gone.
    """
    saved = checkpoint.load(path)
    config: TrainConfig = saved_config(path, saved)
    dataset = load(config.data, config.classes)
    model = build(config.model, dataset.in_channels, dataset.image_size, len(dataset.classes))
    model.load_state_dict(saved["model"])
    return Problem(
        model.to(device).eval(),
        LOSSES[config.loss],
        _batches(dataset.to(device), samples),
        config.weight_decay,
        {"model": f"{config.model} of {path}", "data": config.data, "loss": config.loss},
        device,
    )


def _at_the_start(arguments: argparse.Namespace, device: str) -> Problem:
    """A model as its seed makes it, or with the weights given, in evaluation mode."""
    config = TrainConfig(model=arguments.model, data=arguments.data, classes=arguments.classes)
    dataset = load(config.data, config.default_classes())
    with torch.random.fork_rng():
        torch.manual_seed(arguments.seed)
        shape = (dataset.in_channels, dataset.image_size, len(dataset.classes))
        model = build(config.model, *shape).eval()
    if arguments.weights is not None:
        load_weights(model, arguments.weights, arguments.weights_key)
    return Problem(
        model.to(device),
        LOSSES[arguments.loss],
        _batches(dataset.to(device), arguments.samples),
        arguments.weight_decay,
        {"model": config.model, "data": config.data, "loss": arguments.loss},
        device,
    )


def _batches(dataset: Dataset, samples: int | None) -> list[tuple[Tensor, Tensor]]:
    """The training rows, or the first so many of them, standardised."""
    images = dataset.standardise(dataset.train.images[:samples])
    return list(
        zip(images.split(_BATCH), dataset.train.labels[:samples].split(_BATCH), strict=True)
    )
