"""How near the edge of stability SGD, heavy ball and Adam train, as tracked and exactly.

    python bench/edge.py DIR [--runs RUN ...]

DIR is a CIFAR-10 folder: planes and cars at half size (16x16), the MLP of three hidden layers of
200 units with GELU (235,000 parameters), mean squared error, no weight decay, 120 steps, seed 0.
Each optimizer trains at a rate that reaches the edge on the full batch and at one well below it: on
the full batch of the first 2,000 pictures, and on minibatches of 512 of all 10,000. Two trackers
with `optimizer=optimizer` look at every step: by default, and with `tol=0.1`. At ten steps
`eigsh(mode="exact", preconditioner=optimizer, tol=1e-3)` finds the largest eigenvalue of P⁻¹H of
the same θ and minibatch; rate times it over the optimizer's threshold is the exact edge.

The table has each run's edge and loss at the last of the ten steps, and the median and the worst of
|edge/exact − 1| over them; then over the ten steps of all runs of one optimizer. "Cross 1": at how
many steps the edge rose above 1, as `on_edge` counts them.

Other runs than RUN stay as the CSV has them. Without DIR all do.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import lyapcuda

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.paper.config import LOSSES  # noqa: E402
from examples.paper.data import BatchLoader, Dataset, load  # noqa: E402
from examples.paper.models import build  # noqa: E402
from tracking_cost import RESULTS, report  # noqa: E402

CSV = RESULTS / "edge.csv"
PICTURE = ROOT / "docs" / "images" / "edge.png"
STEPS, POINTS, WARM = 120, 10, 4  # WARM: no exact value before that step
FULL, BATCH, SIZE = 2000, 512, 16
MODES = {"default": {}, "tol=0.1": {"tol": 0.1}}

Batch = tuple[Tensor, Tensor]
Row = dict[str, float]
Runs = dict[str, list[Row]]


@dataclass(frozen=True)
class Run:
    """An optimizer at a rate, on the full batch or on minibatches."""

    optimizer: str
    rate: float
    full: bool

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.rate:g}, {self.batches}"

    @property
    def batches(self) -> str:
        return "full batch" if self.full else "minibatches"

    def make(self, model: nn.Module) -> Optimizer:
        if self.optimizer == "Adam":
            return Adam(model.parameters(), lr=self.rate)
        momentum = 0.9 if self.optimizer == "heavy ball" else 0.0
        return SGD(model.parameters(), lr=self.rate, momentum=momentum)


#: Optimizer → rates: one that reaches the edge, one well below.
RATES = {"SGD": (0.3, 0.03), "heavy ball": (0.15, 0.03), "Adam": (1e-3, 1e-4)}
RUNS = {
    run.name: run
    for full in (True, False)
    for optimizer, rates in RATES.items()
    for run in (Run(optimizer, rate, full) for rate in rates)
}


def model_of(dataset: Dataset) -> nn.Module:
    torch.manual_seed(0)
    model = build("mlp", dataset.in_channels, SIZE, 2)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.GELU())
    return model


def batches_of(dataset: Dataset, full: bool) -> Iterator[Batch]:
    def small(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, dataset.image_size // SIZE)

    if full:
        first = dataset.standardise(dataset.train.images[:FULL])
        yield from repeat((small(first), dataset.train.labels[:FULL]))
    loader = BatchLoader(dataset, BATCH, seed=0)
    while True:
        images, labels = loader.next()
        yield small(images), labels


def train(run: Run, dataset: Dataset) -> list[Row]:
    """A row a step; ``exact`` is NaN where it wasn't looked for."""
    model = model_of(dataset)
    optimizer, parameters = run.make(model), list(model.parameters())
    trackers = {
        mode: lyapcuda.CurvatureTracker(parameters, optimizer=optimizer, **options)
        for mode, options in MODES.items()
    }
    points = {round(p) for p in np.linspace(WARM, STEPS - 1, POINTS)}
    rows = []
    for step, batch in zip(range(STEPS), batches_of(dataset, run.full), strict=False):

        def loss_of(batch: Batch = batch) -> Tensor:
            return LOSSES["mse"](model(batch[0]), batch[1])

        optimizer.zero_grad()
        row = {"step": step, "exact": math.nan}
        for i, (mode, tracker) in enumerate(trackers.items()):
            if i == 0:
                loss = float(tracker.backward(loss_of))  # the gradient of training
            else:
                tracker.step(loss_of)  # leaves no trace
            row |= {mode: float(tracker.edge), f"{mode}, gradients": tracker.gradients}
        if not math.isfinite(loss):
            break
        row["loss"] = loss
        if step in points:
            found = lyapcuda.eigsh(
                loss_of, parameters, mode="exact", preconditioner=optimizer, tol=1e-3
            )
            row["exact"] = float(trackers["default"].edge_at(found.eigenvalues[0]))
        rows.append(row)
        optimizer.step()
    return rows


# --- the CSV --------------------------------------------------------------------------------------


def keep(name: str, rows: list[Row]) -> None:
    """Writes a run beside those that are there."""
    runs = kept() | {name: rows}
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", *rows[0]])
        for run in runs:
            writer.writerows([run, *(f"{x:.5g}" for x in row.values())] for row in runs[run])


def kept() -> Runs:
    """What the CSV has, in the order of `RUNS`."""
    runs: Runs = {name: [] for name in RUNS}
    if CSV.exists():
        with CSV.open(newline="") as file:
            for row in csv.DictReader(file):
                runs[row.pop("run")].append({key: float(x) for key, x in row.items()})
    return {name: rows for name, rows in runs.items() if rows}


# --- the report -----------------------------------------------------------------------------------


def with_exact(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if math.isfinite(row["exact"])]


def errors(rows: Iterable[Row], mode: str) -> str:
    """Median and worst |edge/exact − 1|."""
    found = [abs(row[mode] / row["exact"] - 1) for row in with_exact(rows)]
    return f"{statistics.median(found):.1%}, {max(found):.1%}"


def crossings(rows: list[Row], mode: str) -> int:
    return sum(before[mode] <= 1 < row[mode] for before, row in pairwise(rows))


def gradients(rows: list[Row], mode: str) -> str:
    return f"{rows[-1][f'{mode}, gradients'] / len(rows):.2f}"


def lines_of(runs: Runs) -> list[str]:
    heads = ["run", "edge", "edge, tol=0.1", "exact edge", "largest edge", "cross 1", "loss"]
    heads += ["error: median, worst", "error, tol=0.1", "gradients a step, tol=0.1"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    first, second = MODES
    for name, rows in runs.items():
        last = with_exact(rows)[-1]
        cells = [name] + [f"{last[key]:.3f}" for key in (first, second, "exact")]
        cells += [f"{max(row[second] for row in rows[WARM:]):.2f}", str(crossings(rows, second))]
        cells += [f"{last['loss']:.2g}", *(errors(rows, mode) for mode in MODES)]
        lines.append(f"| {' | '.join([*cells, gradients(rows, second)])} |")
    heads = ["all runs of", "values", *(f"error, {mode}: median, worst" for mode in MODES)]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for batches in dict.fromkeys(run.batches for run in RUNS.values()):
        for optimizer in RATES:
            of = [
                row
                for name, rows in runs.items()
                if (RUNS[name].optimizer, RUNS[name].batches) == (optimizer, batches)
                for row in rows
            ]
            if of:
                cells = [f"{optimizer}, {batches}", str(len(with_exact(of)))]
                lines.append(f"| {' | '.join([*cells, *(errors(of, mode) for mode in MODES)])} |")
    return [*lines, ""]


# --- the picture ----------------------------------------------------------------------------------


def draw(runs: Runs) -> None:
    """Draws edge and loss over the steps: a column an optimizer, full batch above minibatches."""
    import matplotlib.pyplot as plt  # the report does without

    figure = plt.figure(figsize=(10.0, 7.2), layout="constrained")
    panels = figure.subfigures(2, len(RATES))
    for line, full in zip(panels, (True, False), strict=True):
        for panel, (optimizer, rates) in zip(line, RATES.items(), strict=True):
            top, bottom = panel.subplots(2, sharex=True, height_ratios=[2.2, 1])
            for i, rate in enumerate(rates):
                run = Run(optimizer, rate, full)
                rows, color = runs.get(run.name, []), ("C0", "C2")[i]
                step = [row["step"] for row in rows]
                top.plot(step, [row["tol=0.1"] for row in rows], color=color, lw=1.1)
                exact = with_exact(rows)
                where = [row["step"] for row in exact], [row["exact"] for row in exact]
                top.plot(*where, "o", color="black", ms=3.2, zorder=3)
                losses = [row["loss"] for row in rows]
                bottom.semilogy(step, losses, color=color, lw=1.1, label=f"rate {rate:g}")
            top.axhline(1, color="C3", ls="--", lw=1.1)
            top.set(ylim=(0, 2.7), title=f"{optimizer}, {run.batches}")
            top.title.set_fontsize(11)
            bottom.set(xlim=(0, STEPS), ylim=(1e-3, 2), xlabel="training step" if not full else "")
            bottom.legend(frameon=False, fontsize=9, loc="lower left", handlelength=1.2)
            if panel is line[0]:
                top.set_ylabel("edge")
                bottom.set_ylabel("loss")
            for axes in (top, bottom):
                axes.grid(alpha=0.25)
                axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", nargs="?", help="none: the CSV as it is")
    parser.add_argument("--runs", nargs="+", metavar="RUN", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.folder:
        dataset = load(arguments.folder, (0, 1))
        for name in arguments.runs:
            rows = train(RUNS[name], dataset)
            keep(name, rows)
            print(name, *(errors(rows, mode) for mode in MODES), flush=True)
    runs = kept()
    report("edge", "How near the edge of stability", __doc__, lines_of(runs))
    draw(runs)


if __name__ == "__main__":
    main()
