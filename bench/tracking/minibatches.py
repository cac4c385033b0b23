"""h0 as tracked on minibatches, beside each minibatch's exact h0: smooth nets, ReLU, BatchNorm.

    python bench/tracking/minibatches.py DIR [--modes default tol=0.1,iterations=2] [--nets NET ...]

DIR is a CIFAR-10 folder: planes and cars, augmented, minibatches of 512, cross-entropy, SGD without
momentum, weight decay 5e-4, in training mode. Each net runs twice, with seeds 11 and 12 and
learning rates 0.1 and 0.05, none of which served to choose anything; the ResNets see the pictures
at half size. A tracker of every mode measures each minibatch once. After 20 steps the largest
eigenvalue of the Hessian of the minibatch's loss is computed at every fifth step by scipy's Lanczos
on exact products (double backward; BatchNorm takes the minibatch's own statistics there too; of
ReLU that is the Hessian between the kinks).

Reported are the median (90th percentile) over the steps of both runs of |tracked/exact − 1|: of h,
of the Schwarz quotient y·y/(q·y) and the secant ‖y‖/‖q‖; how often h ± h_error holds the exact
value (and the median of h_error/exact); the gradients a step beside the one at θ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import lyapcuda  # noqa: E402
from cifar_mlp import BATCH, DECAY, exact_top  # noqa: E402
from examples.paper.data import BatchLoader, Dataset  # noqa: E402
from examples.paper.data import load as load_pictures  # noqa: E402
from examples.paper.models import BasicBlock, build  # noqa: E402
from peers_problems import SmoothBlock  # noqa: E402
from tracking.readings import (  # noqa: E402
    DEFAULT,
    ERRORS,
    RESULTS,
    Known,
    Modes,
    Row,
    errors,
    keep,
    known,
    load,
    modes_of,
    read,
    recall,
    table,
)

CSV = RESULTS / "tracking_minibatches.csv"
WARM, APART = 20, 5
#: Seed, learning rate.
RUNS = ((11, 0.1), (12, 0.05))


@dataclass(frozen=True)
class Net:
    """One of examples/paper/models.py; ``goal``: what the median error should not exceed."""

    title: str
    model: str
    gelu: bool
    goal: float
    size: int = 32
    steps: int = 100


NETS = {
    "mlp_gelu": Net("MLP, GELU", "mlp", True, 0.02),
    "lenet_gelu": Net("LeNet, GELU", "lenet1", True, 0.02, steps=80),
    "mlp_relu": Net("MLP, ReLU", "mlp", False, 0.06),
    "lenet_relu": Net("LeNet, ReLU", "lenet1", False, 0.06, steps=80),
    "resnet_relu": Net("ResNet0, BatchNorm, ReLU", "resnet0", False, 0.15, 16, 60),
    "resnet_gelu": Net("ResNet0, BatchNorm, GELU", "resnet0", True, 0.15, 16, 60),
}


def model_of(net: Net, dataset: Dataset) -> nn.Module:
    model = build(net.model, dataset.in_channels, net.size, 2)
    for path, module in list(model.named_modules()):
        if net.gelu and isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.GELU())
        if net.gelu and isinstance(module, BasicBlock):
            module.__class__ = SmoothBlock
    return model


def minibatches(dataset: Dataset, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = BatchLoader(dataset, BATCH, seed=seed, augment=True)
    for _ in count():
        pictures, labels = loader.next()
        if size < dataset.image_size:
            pictures = nn.functional.avg_pool2d(pictures, dataset.image_size // size)
        yield pictures, labels


def train(
    dataset: Dataset, name: str, seed: int, rate: float, modes: Modes, found: Known
) -> list[Row]:
    """A training run: a row a mode at every step with an exact value."""
    net, title = NETS[name], f"{name}, seed {seed}, rate {rate}"
    torch.manual_seed(seed)
    model = model_of(net, dataset)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    optimizer = torch.optim.SGD(parameters, lr=rate, weight_decay=DECAY)
    trackers = {
        mode: lyapcuda.CurvatureTracker(parameters, weight_decay=DECAY, **options)
        for mode, options in modes.items()
    }
    generator = np.random.default_rng(seed)
    start = generator.standard_normal(sum(p.numel() for p in parameters))
    rows = []
    batches = minibatches(dataset, net.size, seed)
    for step, batch in zip(range(net.steps), batches, strict=False):

        def loss_of(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        exact = None
        if step >= WARM and step % APART == 0:
            kept = [b.clone() for b in buffers]
            # Not the last vector alone: another one's eigenvalue may have overtaken it.
            start /= np.linalg.norm(start)
            start += 0.1 * generator.standard_normal(len(start)) / len(start) ** 0.5
            loss = loss_of().detach()
            exact = recall(found, title, step, loss)
            if exact is None:
                value, start = exact_top(loss_of, parameters, v0=start, ncv=8, tol=1e-2)
                exact = [value]
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        optimizer.zero_grad()
        for i, (mode, tracker) in enumerate(trackers.items()):
            # One of them gives the gradient of training, the others leave no trace.
            loss = tracker.step(loss_of) if i else tracker.backward(loss_of)
            if exact is not None:
                rows += read(tracker, title, mode, step, loss, exact)
        optimizer.step()
    return rows


def report(rows: list[Row]) -> list[str]:
    lines = []
    for name, net in NETS.items():
        of = [row for row in rows if row.run.startswith(f"{name},")]
        for mode in dict.fromkeys(row.mode for row in of):
            mine = [row for row in of if row.mode == mode]
            lines.append(
                f"| {net.title} | {mode} | {len(mine)} | {errors(mine)} | {net.goal:.0%} |"
            )
    return table(f"net | mode | steps | {ERRORS} | goal", lines)


def measured(
    folder: str | None, modes: Modes | None = None, nets: list[str] | None = None
) -> list[str]:
    """Trains and writes the CSV (without a folder: only reads it); the report's lines."""
    if folder is not None:
        dataset = load_pictures(folder, (0, 1))
        for name in nets or NETS:
            for seed, rate in RUNS:
                rows = train(dataset, name, seed, rate, modes or modes_of(), known(CSV))
                keep(CSV, rows)
            mine = [row for row in load(CSV) if row.run.startswith(f"{name},")]
            print(report(mine)[2], flush=True)
    return report(load(CSV))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", nargs="?", help="none: report on the CSV again")
    parser.add_argument("--modes", nargs="+", metavar="MODE", default=[DEFAULT])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(measured(arguments.folder, modes_of(arguments.modes), arguments.nets)))


if __name__ == "__main__":
    main()
