"""How near the tracked h0 is to an exact value.

    python bench/tracking_accuracy.py DIR [--parts PART ...] [--nanogpt FOLDER]

Five parts; those that aren't run are reported from the CSVs of an earlier run. `edge`,
`minibatches`, `both_ends` and `nanogpt` are the modules of that name in bench/tracking, which say
what they do and run alone as well. `modes` is here: cheaper modes against the full loss.

CIFAR-10 planes/cars, batch 512, SGD without momentum,
weight decay 5e-4, cross-entropy; three runs: an MLP of 3 layers of 200 at learning rates 0.1 and
0.03, LeNet-1 at 0.05, with GELU (smooth: the exact Hessian is that of the differences). After one
epoch of warm-up at the initial θ, trackers in every mode follow each run by their own measurements
of its minibatches; in "2 steps" they take two on each. Exact values are the largest eigenvalue of
the Hessian (Lanczos, products by double backward) of
- the expected loss, for which a fixed set of 2048 augmented pictures stands in, and the minibatch
  of the step: at steps drawn at random, so that a tracker that measures now and then is judged by
  what it still says in between;
- what the mode itself measured (the minibatch, or its part), at those and more steps, as far as it
  measured there.
Reported are the medians over the run of tracked/exact and of |tracked/exact − 1|: of h (of these
smooth nets the Schwarz quotient), ρ (the last Rayleigh quotient), and √(ρ·s) = ‖y‖/‖q‖ ("secant");
and of averages, as `h_ema` is one.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lyapcuda
from cifar_mlp import BATCH, DECAY, exact_top
from lyapcuda.files import LineFile
from lyapcuda.log import csv_line
from tracking import both_ends, edge, minibatches, nanogpt, readings
from tracking_cost import RESULTS, TENTH, report

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader, load  # noqa: E402
from examples.paper.models import build  # noqa: E402


@dataclass(frozen=True)
class Mode:
    """How one of the trackers measures: its options, the share of the minibatch, steps on each."""

    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    steps: int = 1

    @property
    def every(self) -> int:
        return self.options.get("every", 1)

    @property
    def own(self) -> str:
        """The exact value of what it measures."""
        return "minibatch" if self.share == 1.0 else f"part {self.share}"


MODES = {
    "every=1": Mode(),
    "every=10": Mode({"every": 10}),
    "a tenth": Mode(share=TENTH),
    "every=2, a fifth": Mode({"every": 2}, share=0.2),
    "every=5, a half": Mode({"every": 5}, share=0.5),
    "every=1, tol=0.1": Mode({"tol": 0.1}),
    "a tenth, tol=0.1": Mode({"tol": 0.1}, share=TENTH),
    # What more gradients, or momentum, would bring.
    "every=10, 2 steps": Mode({"every": 10}, steps=2),
    "every=10, k=2": Mode({"every": 10, "k": 2}),
    "a tenth, 2 steps": Mode(share=TENTH, steps=2),
    "every=2, a tenth, 2 steps": Mode({"every": 2}, share=TENTH, steps=2),
    "a tenth, k=2": Mode({"k": 2}, share=TENTH),
    "a tenth, momentum=0.3": Mode({"momentum": 0.3}, share=TENTH),
}
OWN = sorted({mode.own for mode in MODES.values()} - {"minibatch"})
EXACT = ("expected", "minibatch")
#: What is compared: label → the tracker's property.
VALUES = {"h": "h", "ρ": "rayleigh"}
#: Model, learning rate, seed.
RUNS = [("mlp", 0.1, 0), ("mlp", 0.03, 1), ("lenet1", 0.05, 2)]


Rows = list[dict[str, float]]


def smooth(name: str, dataset) -> nn.Module:
    model = build(name, dataset.in_channels, dataset.image_size, 2)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(path, nn.GELU())
    return model


def part_of(batch: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    return batch if share == 1.0 else lyapcuda.split_batch(batch, share)[1]


def follow(
    folder: str, run: tuple[str, float, int], epochs: int, points: int, modes: dict[str, Mode]
) -> Rows:
    """A row a step."""
    name, lr, seed = run
    torch.manual_seed(seed)
    dataset = load(folder, (0, 1))
    model = smooth(name, dataset)
    loader = BatchLoader(dataset, BATCH, seed=seed, augment=True)
    source = BatchLoader(dataset, BATCH, seed=seed + 100, augment=True)
    fixed = [torch.cat(column) for column in zip(*(source.next() for _ in range(4)), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=DECAY)
    parameters = list(model.parameters())
    trackers = {}
    for label, mode in modes.items():
        options = {key: value for key, value in mode.options.items() if key != "every"}
        trackers[label] = lyapcuda.CurvatureTracker(parameters, weight_decay=DECAY, **options)

    def loss_of(batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def measure(step: int, batch) -> None:
        for label, mode in modes.items():
            part = part_of(batch, mode.share)
            for _ in range(mode.steps if step % mode.every == 0 else 0):
                trackers[label].step(lambda part=part: loss_of(part))

    for step in range(loader.steps_per_epoch):
        measure(step, loader.next())
    total = epochs * loader.steps_per_epoch
    anywhere = set(random.Random(0).sample(range(total), points))
    measured = set(random.Random(1).sample(range(0, total, 10), min(points // 2, total // 10)))
    starts: dict[str, Any] = {}

    def exact(name: str, data: tuple[Tensor, Tensor]) -> float:
        found, starts[name] = exact_top(
            lambda: loss_of(data), parameters, v0=starts.get(name), ncv=8, tol=1e-2
        )
        return found

    rows = []
    for step in range(total):
        batch = loader.next()
        measure(step, batch)
        row = dict.fromkeys((*EXACT, *OWN), math.nan)
        if step in anywhere:
            row["expected"] = exact("expected", fixed)
        if step in anywhere | measured:
            for mode in modes.values():
                if step % mode.every == 0 or mode.share == 1.0 and step in anywhere:
                    if math.isnan(row[mode.own]):
                        row[mode.own] = exact(mode.own, part_of(batch, mode.share))
        for label, tracker in trackers.items():
            for what, name in VALUES.items():
                row[f"{label}, {what}"] = float(getattr(tracker, name).reshape(-1)[0])
            low, high = tracker.interval.reshape(-1, 2)[0].tolist()
            row[f"{label}, low"], row[f"{label}, high"] = low, high
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        rows.append({"step": step, "loss": float(loss.detach()), **row})
        if step in anywhere | measured:
            print(step, {k: round(row[k], 2) for k in (*EXACT, *OWN)}, flush=True)
    return rows


def keep(path: Path, rows: Rows) -> None:
    """Writes them, with the columns of other modes that an earlier run of as many steps has."""
    earlier = rows_of(path) if path.exists() else []
    if len(earlier) == len(rows):  # the same run: trackers leave no trace in it
        for old, new in zip(earlier, rows, strict=True):
            new |= {k: v for k, v in old.items() if k not in new or math.isnan(new[k])}
    names = sorted(rows[0], key=lambda name: name.partition(",")[0] != name)
    lines = [csv_line([f"{row[name]:.5g}" for name in names]) for row in rows]
    LineFile(path, [csv_line(names), *lines])


def average(values: list[float], every: int, past: float) -> list[float]:
    """An exponential moving average over the measurements, as `h_ema` takes it."""
    out: list[float] = []
    for step, value in enumerate(values):
        if not out:
            out.append(value)
        else:
            out.append(past * out[-1] + (1 - past) * value if step % every == 0 else out[-1])
    return out


def rows_of(path: Path) -> Rows:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def ratios(rows: Rows, label: str, what: str, past: float, name: str, due: bool) -> list[float]:
    """tracked/exact at the steps with an exact value; ``due``: only where the mode measures."""
    every = MODES[label].every
    if what == "secant":  # √(ρ·s)
        pairs = ((row[f"{label}, ρ"], row[f"{label}, h"]) for row in rows)
        column = [math.sqrt(max(a * b, 0.0)) for a, b in pairs]
    else:
        column = [row[f"{label}, {what}"] for row in rows]
    column = average(column, every, past)
    return [
        value / row[name]
        for step, (value, row) in enumerate(zip(column, rows, strict=True))
        if math.isfinite(row[name]) and not (due and step % every)
    ]


def has(rows: Rows, label: str) -> bool:
    return f"{label}, h" in rows[0]


def off(found: list[float]) -> float:
    return statistics.median(abs(ratio - 1) for ratio in found)


def summary(runs: dict[str, Rows]) -> list[str]:
    """The error of h in all runs, mode by mode."""
    columns = [("own", True), ("minibatch", True), ("minibatch", False), ("expected", False)]
    head = ["its own, where it measured", "the minibatch, where it measured"]
    head += ["the minibatch, at any step", "the expected loss, at any step"]
    lines = [
        f"h: median of |tracked/exact − 1| in the runs {', '.join(runs)}:",
        "",
        "| mode | " + " | ".join(head) + " |",
        "|---" * 5 + "|",
    ]
    for label, mode in MODES.items():
        if not any(has(rows, label) for rows in runs.values()):
            continue
        cells = []
        for name, due in columns:
            of = mode.own if name == "own" else name
            errors = [
                f"{off(ratios(rows, label, 'h', 0.0, of, due)):.3f}" if has(rows, label) else "–"
                for rows in runs.values()
            ]
            cells.append(", ".join(errors))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def accuracy(title: str, rows: Rows) -> list[str]:
    at = [i for i, row in enumerate(rows) if math.isfinite(row[EXACT[0]])]
    first = f"{len(rows)} steps, exact values at {len(at)} of them: "
    for name in EXACT:
        found = [rows[i][name] for i in at]
        first += f"{name} {found[0]:.3g} at first, {max(found):.3g} at most; "
    lines = [
        f"## {title}",
        "",
        first.rstrip("; ") + ".",
        "",
        "Median of tracked/exact, and of |tracked/exact − 1|:",
        "",
        "| mode | value | expected | error | minibatch | error | its own | error |",
        "|---" * 8 + "|",
    ]
    modes = {label: mode for label, mode in MODES.items() if has(rows, label)}
    for label, mode in modes.items():
        averaged = [(what, past) for what in ("h", "secant") for past in (0.5, 0.8)]
        for what, past in (*((w, 0.0) for w in (*VALUES, "secant")), *averaged):
            line = f"| {label} | {what}{f', averaged with ema={past}' if past else ''} |"
            for name, due in (("expected", False), ("minibatch", False), (mode.own, True)):
                found = ratios(rows, label, what, past, name, due)
                line += f" {statistics.median(found):.3f} | {off(found):.3f} |"
            lines.append(line)
    lines += ["", "Exact value inside the interval:", ""]
    for label in modes:
        inside = [
            sum(rows[i][f"{label}, low"] <= rows[i][name] <= rows[i][f"{label}, high"] for i in at)
            for name in EXACT
        ]
        both = ", ".join(f"{n} {name}" for n, name in zip(inside, EXACT, strict=True))
        lines.append(f"- {label}: {both}, of {len(at)}")
    return [*lines, ""]


#: What each part runs; "modes" has its own.
PARTS = ("modes", "edge", "minibatches", "both_ends", "nanogpt")
TRACKERS = {
    "edge": ("default", "tol=0.1,iterations=2", "tol=0.1,iterations=2,mode=exact"),
    "minibatches": ("default", "tol=0.1,iterations=2"),
    "both_ends": ("default", "tol=0.1,iterations=4"),
    "nanogpt": ("default", "tol=0.1,iterations=2", "tol=0.1,iterations=4"),
}


def others(folder: str | None, parts: list[str], model: str | None) -> list[str]:
    """Runs the parts of bench/tracking that are asked for; the lines of all of them."""
    modes = {part: readings.modes_of(texts) for part, texts in TRACKERS.items()}
    if folder is not None and "edge" in parts:
        edge.measure(Path(folder), list(edge.RUNS), modes["edge"])
    lines = ["# At the edge of stability", "", *edge.lines()]
    at = folder if "minibatches" in parts else None
    lines += ["# Minibatches", "", *minibatches.measured(at, modes["minibatches"])]
    again = folder is not None and "both_ends" in parts
    lines += ["# Both ends", "", *both_ends.measured(modes["both_ends"], again=again)]
    again = folder is not None and "nanogpt" in parts and model is not None
    return [
        *lines,
        "# nanoGPT",
        "",
        *nanogpt.measured(model and Path(model), modes["nanogpt"], again=again),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", nargs="?", help="none: report on the CSVs again")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS))
    parser.add_argument("--nanogpt", metavar="FOLDER", help="with nanoGPT's model.py")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--points", type=int, default=20, help="steps with exact values")
    parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", default=list(MODES))
    parser.add_argument("--runs", nargs="+", type=int, default=[0, 1, 2], help="which of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs, lines = {}, []
    for number, run in enumerate(RUNS):
        title = f"{run[0]}, learning rate {run[1]}"
        path = RESULTS / f"tracking_accuracy_{run[0]}_{run[1]}.csv"
        if arguments.folder and "modes" in arguments.parts and number in arguments.runs:
            modes = {label: MODES[label] for label in arguments.modes}
            rows = follow(arguments.folder, run, arguments.epochs, arguments.points, modes)
            keep(path, rows)
        runs[title] = rows_of(path)
        lines += accuracy(title, runs[title])
    lines += others(arguments.folder, arguments.parts, arguments.nanogpt)
    report("tracking_accuracy", "Tracked h0 beside exact values", __doc__, [*summary(runs), *lines])


if __name__ == "__main__":
    main()
