"""What tracking costs beside a training step, and how near the tracked h0 is to an exact value.

    python bench/tracking.py cost [--rounds 12] [--models mlp lenet1]
    python bench/tracking.py accuracy DIR [--epochs 12] [--lr 0.1]

cost: training steps (zero_grad, backward, SGD) at batch 512, plain and tracked in every mode, in
blocks of ten, the modes in turns. Reported are the fastest block of a mode over the fastest plain
one, and the median over the rounds of a block's time over that of the same round's plain block.
Times are the process's CPU time on one thread.

accuracy: CIFAR-10 planes/cars (a folder as for `lyapcuda train`), an MLP of 3 layers of 200 with
GELU (smooth: the exact Hessian is that of the differences), batch 512, SGD without momentum, weight
decay 5e-4, cross-entropy. After one epoch of warm-up at the initial θ, trackers in every mode
follow one run, each by its own measurements of the run's minibatches. Exact values are the largest
eigenvalue of the Hessian (Lanczos, products by double backward) of
- the expected loss, for which a fixed set of 2048 augmented pictures stands in, and the minibatch
  of the step: at steps drawn at random, so that a tracker that measures now and then is judged by
  what it still says in between;
- what the mode itself measured (the minibatch, or its part), at those and more steps, as far as it
  measured there.
Reported are the medians over the run of tracked/exact and of |tracked/exact − 1|. Both commands
write to bench/results/tracking_*.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lyapcuda
from cifar_mlp import BATCH, DECAY, exact_top
from lyapcuda.experiment.data import BatchLoader, load
from lyapcuda.experiment.models import build
from lyapcuda.files import LineFile
from lyapcuda.log import csv_line
from ops import cpu_name

RESULTS = Path(__file__).parent / "results"
TENTH = 0.1


# --- cost ----------------------------------------------------------------------------------------

Step = Callable[[], object]


def stepping(name: str, batch: int) -> dict[str, Step]:
    """A training step of one model in every mode."""
    torch.manual_seed(0)
    model = build(name, 3, 32, 10)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    rest, part = lyapcuda.split_batch((x, y), TENTH)
    halves = lyapcuda.split_batch((x, y), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def plain() -> None:
        optimizer.zero_grad()
        loss_of((x, y)).backward()
        optimizer.step()

    def whole() -> Tensor:
        return loss_of((x, y))

    def mode(closure: Callable, *, half: bool = False, every: int = 1, **measure) -> Step:
        tracker = lyapcuda.CurvatureTracker(model.parameters(), every=every)

        def step() -> None:
            if half and tracker.due:
                tracker.step(loss_of, batches=halves, leave_grad=True)
            else:
                tracker.step(closure, **measure, leave_grad=True)
            optimizer.step()

        return step

    def accumulated() -> None:
        optimizer.zero_grad()
        for part_of in (rest, part):
            (loss_of(part_of) * (len(part_of[1]) / batch)).backward()
        optimizer.step()

    return {
        "plain": plain,
        "every=1": mode(whole),
        "every=10": mode(whole, every=10),
        "every=5, a half, batches= where due": mode(whole, every=5, half=True),
        "a tenth, measure=": mode(whole, measure=lambda: loss_of(part)),
        "a tenth, batches=": mode(loss_of, batches=(rest, part)),
        "plain, accumulated as rest + tenth": accumulated,
    }


def cost(rounds: int, names: list[str]) -> list[str]:
    lines = []
    for name in names:
        steps = stepping(name, BATCH)
        found: dict[str, list[float]] = {mode: [] for mode in steps}
        for step in steps.values():
            for _ in range(3):
                step()
        for number in range(rounds):
            order = list(steps)
            random.Random(number).shuffle(order)
            taken = {}
            for mode in order:
                start = time.process_time()
                for _ in range(10):
                    steps[mode]()
                taken[mode] = time.process_time() - start
            for mode in steps:
                found[mode].append(taken[mode])
        base = found["plain"]
        lines += [
            f"## {name}",
            "",
            "| mode | fastest blocks | median | quartiles |",
            "|---" * 4 + "|",
        ]
        for mode in list(steps)[1:]:
            ratios = [a / b for a, b in zip(found[mode], base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            fastest = min(found[mode]) / min(base)
            lines.append(f"| {mode} | {fastest:.3f} | {middle:.3f} | {low:.3f}–{high:.3f} |")
        lines += ["", f"A plain step: {min(base) / 10 * 1e3:.1f} ms (fastest block).", ""]
    return lines


# --- accuracy ------------------------------------------------------------------------------------

#: Mode → (options, share of the minibatch measured).
MODES: dict[str, tuple[dict, float]] = {
    "every=1": ({}, 1.0),
    "every=10": ({"every": 10}, 1.0),
    "a tenth": ({}, TENTH),
    "every=2, a fifth": ({"every": 2}, 0.2),
    "every=5, a half": ({"every": 5}, 0.5),
}
EXACT = ("expected", "minibatch")
#: What is compared: label → the tracker's property.
VALUES = {"h": "h", "ρ": "rayleigh", "Schwarz": "schwarz"}


def smooth_mlp(dataset) -> nn.Module:
    model = build("mlp", dataset.in_channels, dataset.image_size, 2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.GELU())
    return model


def part_of(batch: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    return batch if share == 1.0 else lyapcuda.split_batch(batch, share)[1]


def follow(folder: str, lr: float, epochs: int, points: int, out: Path) -> None:
    """Writes a row a step to a CSV."""
    torch.manual_seed(0)
    dataset = load(folder, (0, 1))
    model = smooth_mlp(dataset)
    loader = BatchLoader(dataset, BATCH, seed=0, augment=True)
    source = BatchLoader(dataset, BATCH, seed=1, augment=True)
    fixed = [torch.cat(column) for column in zip(*(source.next() for _ in range(4)), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=DECAY)
    parameters = list(model.parameters())
    trackers = {
        mode: lyapcuda.CurvatureTracker(parameters, weight_decay=DECAY, **options)
        for mode, (options, _) in MODES.items()
    }

    def loss_of(batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def measure(batch) -> None:
        for mode, (_, share) in MODES.items():
            part = part_of(batch, share)
            trackers[mode].step(lambda part=part: loss_of(part))

    for _ in range(loader.steps_per_epoch):
        measure(loader.next())
    total = epochs * loader.steps_per_epoch
    anywhere = set(random.Random(0).sample(range(total), points))
    measured = set(random.Random(1).sample(range(0, total, 10), points // 2))
    starts: dict[str, Any] = {}

    def exact(name: str, data: tuple[Tensor, Tensor]) -> float:
        found, starts[name] = exact_top(
            lambda: loss_of(data), parameters, v0=starts.get(name), ncv=8, tol=1e-2
        )
        return found

    values = [f"{mode}, {what}" for mode in MODES for what in ("own", *VALUES, "low", "high")]
    file = LineFile(out, [csv_line(["step", "loss", *EXACT, *values])])
    for step in range(total):
        batch = loader.next()
        measure(batch)
        row = dict.fromkeys((*EXACT, *values), math.nan)
        if step in anywhere:
            row["expected"] = exact("expected", fixed)
            row["minibatch"] = exact("minibatch", batch)
        for mode, (options, share) in MODES.items():
            if step in anywhere | measured and step % options.get("every", 1) == 0:
                whole = share == 1.0 and math.isfinite(row["minibatch"])
                row[f"{mode}, own"] = (
                    row["minibatch"] if whole else exact(f"{share}", part_of(batch, share))
                )
            tracker = trackers[mode]
            for what, name in VALUES.items():
                row[f"{mode}, {what}"] = float(getattr(tracker, name))
            row[f"{mode}, low"], row[f"{mode}, high"] = tracker.interval.tolist()
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        numbers = [float(loss.detach()), *row.values()]
        file.add([csv_line([step, *(f"{v:.5g}" for v in numbers)])])
        if step in anywhere | measured:
            print(step, {k: round(v, 2) for k, v in row.items() if v == v}, flush=True)


def average(values: list[float], every: int, past: float) -> list[float]:
    """An exponential moving average over the measurements, as `h_ema` takes it."""
    out: list[float] = []
    for step, value in enumerate(values):
        if not out:
            out.append(value)
        else:
            out.append(past * out[-1] + (1 - past) * value if step % every == 0 else out[-1])
    return out


def accuracy(path: Path) -> list[str]:
    with path.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    at = [i for i, row in enumerate(rows) if math.isfinite(row[EXACT[0]])]
    lines = [f"{len(rows)} steps, exact values at {len(at)} of them: ", ""]
    for name in EXACT:
        found = [rows[i][name] for i in at]
        lines[0] += f"{name} {found[0]:.3g} at first, {max(found):.3g} at most; "
    lines[0] = lines[0].rstrip("; ") + "."
    lines += [
        "Median of tracked/exact, and of |tracked/exact − 1|:",
        "",
        "| mode | value | expected | error | minibatch | error | its own | error |",
        "|---" * 8 + "|",
    ]
    for mode, (options, _) in MODES.items():
        own = [i for i, row in enumerate(rows) if math.isfinite(row[f"{mode}, own"])]
        for what, past in (*((w, 0.0) for w in VALUES), ("h", 0.5), ("Schwarz", 0.5)):
            column = [row[f"{mode}, {what}"] for row in rows]
            column = average(column, options.get("every", 1), past)
            line = f"| {mode} | {what}{f', averaged with ema={past}' if past else ''} |"
            for name, where in (("expected", at), ("minibatch", at), (f"{mode}, own", own)):
                ratios = [column[i] / rows[i][name] for i in where]
                error = statistics.median(abs(r - 1) for r in ratios)
                line += f" {statistics.median(ratios):.3f} | {error:.3f} |"
            lines.append(line)
    lines += ["", "Exact value inside the interval:", ""]
    for mode in MODES:
        inside = [
            sum(rows[i][f"{mode}, low"] <= rows[i][name] <= rows[i][f"{mode}, high"] for i in at)
            for name in EXACT
        ]
        both = ", ".join(f"{n} {name}" for n, name in zip(inside, EXACT, strict=True))
        lines.append(f"- {mode}: {both}, of {len(at)}")
    return [*lines, ""]


def report(name: str, title: str, lines: list[str]) -> None:
    machine = f"Machine: {cpu_name()}, one thread, torch {torch.__version__}."
    text = [f"# {title}", "", __doc__.split("\n\n", 2)[2].strip(), "", machine, "", *lines]
    (RESULTS / f"{name}.md").write_text("\n".join(text))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("cost")
    costs.add_argument("--rounds", type=int, default=12)
    costs.add_argument("--models", nargs="+", default=["mlp", "lenet1"])
    accurate = commands.add_parser("accuracy")
    accurate.add_argument("folder", metavar="DIR", help="or a CSV of an earlier run, to report on")
    accurate.add_argument("--epochs", type=int, default=12)
    accurate.add_argument("--lr", type=float, default=0.1)
    accurate.add_argument("--points", type=int, default=24, help="steps with exact values")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "cost":
        lines = cost(arguments.rounds, arguments.models)
        return report("tracking_cost", "What tracking costs", lines)
    path = Path(arguments.folder)
    if path.is_dir():
        path = RESULTS / "tracking_accuracy.csv"
        follow(arguments.folder, arguments.lr, arguments.epochs, arguments.points, path)
    report("tracking_accuracy", "Tracked h0 beside exact values", accuracy(path))


if __name__ == "__main__":
    main()
