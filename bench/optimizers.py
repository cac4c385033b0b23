"""LyapunovSGD, with one curvature and with several, against SGD and Adam.

    python bench/optimizers.py [--data DIR] [--models mlp ...] [--warmup N] [--out OUT]

Every method starts from the same parameters and sees the same minibatches. SGD and Adam get the
best of a grid of learning rates, chosen by the loss after all steps (so their rows are the best of
several runs); LyapunovSGD runs once, with its defaults. Losses are means over the last 20
minibatches, and over seeds. "By gradients" is the loss when a run has spent as many gradient
evaluations as SGD did in all its steps, the warm-up included; "none left" where that took them all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lyapcuda import LyapunovSGD
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.config import LOSSES  # noqa: E402
from examples.paper.data import BatchLoader, Dataset, load  # noqa: E402
from examples.paper.models import build  # noqa: E402

#: The paper's two-class models with their losses.
MODELS = {"linear": "mse", "mlp": "ce", "lenet1": "ce", "resnet0": "ce"}
SGD_RATES = (0.03, 0.1, 0.3, 1.0)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
#: LyapunovSGD's settings; with k = 1 it is the paper's.
OURS = {
    "k = 1": {},
    "k = 1, every 10": {"every": 10},
    "k = 5": {"k": 5},
    "k = 10": {"k": 10},
    "k = 10, every 10": {"k": 10, "every": 10},
}
WINDOW = 20

#: (gradients spent, loss) after every step.
Run = list[tuple[int, float]]


class Counted:
    """A closure that counts how often it is called."""

    def __init__(self, model: nn.Module, loss: str) -> None:
        self.model, self.loss_of, self.calls = model, LOSSES[loss], 0

    def at(self, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            return self.loss_of(self.model(batch[0]), batch[1])

        return closure


def run(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    dataset: Dataset,
    model: str,
    batch: int,
    steps: int,
    seed: int,
) -> Run:
    torch.manual_seed(seed)
    net = build(model, dataset.in_channels, dataset.image_size, len(dataset.classes))
    loader = BatchLoader(dataset, batch, seed, False)
    optimizer, counted, out = make(net), Counted(net, MODELS[model]), []
    for _ in range(steps):
        closure = counted.at(loader.next())
        if isinstance(optimizer, LyapunovSGD):
            loss = float(optimizer.step(closure))
        else:
            optimizer.zero_grad()
            value = closure()
            value.backward()
            optimizer.step()
            loss = float(value.detach())
        out.append((counted.calls, loss))
        if not math.isfinite(loss):
            break
    return out


def loss_after(run: Run, gradients: float = math.inf) -> float:
    """The mean over the last minibatches within so many gradients."""
    losses = [loss for spent, loss in run if spent <= gradients]
    if not losses:
        return math.nan
    if not all(map(math.isfinite, losses)):
        return math.inf
    return statistics.fmean(losses[-WINDOW:])


def compare(
    dataset: Dataset, model: str, batch: int, steps: int, seeds: int, warmup: int | None
) -> dict[str, tuple[float, float, int]]:
    """Method → loss by steps, loss by gradients, gradients spent in all steps."""
    out: dict[str, tuple[float, float, int]] = {}

    def runs(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Run]:
        return [run(make, dataset, model, batch, steps, seed) for seed in range(seeds)]

    def note(name: str, found: list[Run]) -> None:
        by_steps = statistics.fmean(loss_after(r) for r in found)
        by_gradients = statistics.fmean(loss_after(r, steps) for r in found)
        out[name] = (by_steps, by_gradients, found[0][-1][0])
        print(f"{model:8} {name:20} {by_steps:9.4f} {by_gradients:9.4f}", flush=True)

    for rate in SGD_RATES:
        note(f"SGD {rate:g}", runs(lambda m, r=rate: torch.optim.SGD(m.parameters(), lr=r)))
    for rate in ADAM_RATES:
        note(f"Adam {rate:g}", runs(lambda m, r=rate: torch.optim.Adam(m.parameters(), lr=r)))
    for name, options in OURS.items():
        if warmup is not None:
            options = {**options, "warmup_iterations": warmup}
        note(name, runs(lambda m, o=options: LyapunovSGD(m.parameters(), **o)))
    return out


def best(found: dict[str, tuple[float, float, int]], kind: str) -> tuple[str, tuple]:
    mine = {name: row for name, row in found.items() if name.startswith(kind)}
    name = min(mine, key=lambda n: mine[n][0])
    return f"{kind}, best of {len(mine)} ({name.split()[1]})", mine[name]


def number(value: float) -> str:
    if math.isnan(value):
        return "none left"
    return "diverged" if math.isinf(value) else f"{value:.3g}"


def table(found: dict[str, tuple[float, float, int]]) -> list[str]:
    rows = [best(found, "SGD"), best(found, "Adam")]
    rows += [(name, found[name]) for name in OURS]
    lines = ["| method | loss by steps | loss by gradients | gradients |", "|---|---|---|---|"]
    return lines + [f"| {n} | {number(a)} | {number(b)} | {c} |" for n, (a, b, c) in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="a CIFAR-10 folder; without it scikit-learn's digits")
    add("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=128)
    add("--seeds", type=int, default=2)
    add("--warmup", type=int, help="of LyapunovSGD, at most; default its own")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dataset = load(arguments.data or "digits", (0, 1) if arguments.data else None)
    what = "CIFAR-10 planes/cars" if arguments.data else "digits"
    lines = [
        "# Optimizers",
        "",
        f"Machine: {cpu_name()}, one thread; {what}, {arguments.steps} steps",
    ]
    lines[-1] += f" of {arguments.batch}, {arguments.seeds} seeds"
    if arguments.warmup is not None:
        lines[-1] += f", at most {arguments.warmup} measurements of warm-up"
    lines[-1] += ". Made by `bench/optimizers.py`."
    lines += ["", " ".join(" ".join(__doc__.split("\n\n")[2:]).split()), ""]
    report = {}
    for model in arguments.models:
        found = compare(
            dataset, model, arguments.batch, arguments.steps, arguments.seeds, arguments.warmup
        )
        report[model] = found
        lines += [f"## {model} ({MODELS[model]})", "", *table(found), ""]
        if arguments.out:
            arguments.out.with_suffix(".md").write_text("\n".join(lines))
            arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
