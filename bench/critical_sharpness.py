"""Critical sharpness beside the edge: what the next step does, and whether swings grow.

    python bench/critical_sharpness.py

400 of scikit-learn's digits, the net of `edge_spikes.py` (tanh, squared error), the full batch, 300
steps: SGD at 0.1 and Adam at 0.01. A tracker with `optimizer=optimizer` measures every step. At
every second one `critical_sharpness(closure, optimizer)` searches for the rate η_c at which the
step that comes next would raise the loss, by forward passes. Both are drawn as rate over limit: the
edge, and rate/η_c, each 1 where the step reaches its limit.

The table: at how many of these steps each was above 1, how many of the steps with rate/η_c > 1
raised the loss, and of those with edge > 1; the forward passes, and what each cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

import lyapcuda

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from edge_spikes import images_of, network  # noqa: E402
from tracking_cost import report  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "critical_sharpness.png"
STEPS, EVERY, RATES = 300, 2, {"SGD": 0.1, "Adam": 0.01}


@dataclass
class Run:
    """By step where both were measured, but ``losses``, which has all steps."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    critical: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)


def train(name: str) -> Run:
    torch.manual_seed(0)
    x, y = images_of()
    model = network()
    kinds: dict[str, type[Optimizer]] = {"SGD": SGD, "Adam": Adam}
    rate = RATES[name]
    optimizer = kinds[name](model.parameters(), lr=rate)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), optimizer=optimizer)
    run, start = Run(), None

    def closure() -> Tensor:
        return (model(x) - y).square().sum(1).mean()

    for step in range(STEPS):
        optimizer.zero_grad()
        began = time.perf_counter()
        run.losses.append(float(tracker.backward(closure)))
        measured = time.perf_counter()
        if step and step % EVERY == 0:
            found = lyapcuda.critical_sharpness(closure, optimizer, start=start)
            start = found.rate if found.converged else None
            run.seconds.append((measured - began, time.perf_counter() - measured))
            run.steps.append(step)
            run.edges.append(float(tracker.edge))
            run.critical.append(rate / found.rate)
            run.evaluations.append(found.evaluations)
        optimizer.step()
    with torch.no_grad():
        run.losses.append(float(closure()))
    return run


def raised(run: Run, values: list[float]) -> str:
    """Of the steps where a value is above 1, how many raised the loss."""
    above = [step for step, value in zip(run.steps, values, strict=True) if value > 1]
    risen = sum(run.losses[step + 1] > run.losses[step] for step in above)
    return f"{risen} of {len(above)}"


def lines_of(runs: dict[str, Run]) -> list[str]:
    heads = ["optimizer", "steps", "... that raised the loss", "rate/η_c above 1: loss rose"]
    heads += [
        "edge above 1: loss rose",
        "forward passes, median",
        "time of a search, of a tracked step",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, run in runs.items():
        risen = sum(run.losses[step + 1] > run.losses[step] for step in run.steps)
        tracked, searched = (statistics.median(times) for times in zip(*run.seconds, strict=True))
        cells = [f"{name}, {RATES[name]:g}", str(len(run.steps)), str(risen)]
        cells += [raised(run, run.critical), raised(run, run.edges)]
        cells += [f"{statistics.median(run.evaluations):g}", f"{searched / tracked:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw(runs: dict[str, Run]) -> None:
    """A column an optimizer: both values over the steps, the loss below."""
    import matplotlib.pyplot as plt  # the report does without

    figure, axes = plt.subplots(
        2,
        2,
        sharex=True,
        sharey="row",
        figsize=(10.0, 4.4),
        height_ratios=[1.7, 1],
        layout="constrained",
    )
    for (name, run), (top, bottom) in zip(runs.items(), axes.T, strict=True):
        top.plot(run.steps, run.critical, color="C1", lw=1.0, label="rate / critical rate")
        top.plot(run.steps, run.edges, color="C0", lw=1.3, label="edge")
        top.axhline(1, color="C3", ls="--", lw=1.1)
        top.set(ylim=(0, 2), title=f"{name}, rate {RATES[name]:g}")
        top.title.set_fontsize(11)
        bottom.semilogy(run.losses, color="C2", lw=1.1)
        bottom.set(xlim=(0, STEPS), xlabel="training step")
        for each in (top, bottom):
            each.grid(alpha=0.25)
            each.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("over its limit")
    axes[1, 0].set_ylabel("loss")
    axes[0, 0].legend(frameon=False, fontsize=9, loc="upper left")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(1)
    runs = {name: train(name) for name in RATES}
    report("critical_sharpness", "Critical sharpness beside the edge", __doc__, lines_of(runs))
    draw(runs)


if __name__ == "__main__":
    main()
