"""Whether the edge warns of Adam's loss spikes: how many steps before, and how often in vain.

    python bench/edge_spikes.py [--draw]

400 of scikit-learn's digits, a net of two hidden layers of 64 tanh units, squared error, Adam at
0.01 with β₂ = 0.999 and no warm-up, 600 steps, ten seeds; the full batch, and minibatches of 100.
As the gradients shrink √v̂ shrinks after them, and the largest eigenvalue of P⁻¹H grows to the
threshold, 38/rate (arXiv 2506.04805). A tracker with `optimizer=optimizer` measures every step, at
one gradient more. `on_edge(callback, above=...)` has four alarms, at 0.95, 1, 1.05 and 1.2.

A spike begins where the loss exceeds twice the median of the 20 steps before, more than 20 steps
after the last such step. It was warned of by the latest alarm within the 50 steps before that
isn't older than the last spike. An alarm is false where no spike begins within 50 steps, unless it
falls into one. The first 20 steps aren't counted.

The same runs with `RateCap(optimizer, tracker, c)`, at 1 and 0.9: how many spikes are left, and the
median loss of the last 50 steps (geometric mean over the seeds).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

import lyapcuda

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from digits import images_and_labels  # noqa: E402
from tracking_cost import report  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "edge_spikes.png"
IMAGES, BATCH, RATE, STEPS, SEEDS = 400, 100, 0.01, 600, 10
ABOVE = (0.95, 1.0, 1.05, 1.2)
FACTOR, BEFORE, WITHIN = 2.0, 20, 50
KINDS = {"full batch": IMAGES, f"minibatches of {BATCH}": BATCH}
CAPS = (None, 1.0, 0.9)


@dataclass
class Run:
    """Loss and edge of every step; the steps of every alarm."""

    kind: str
    seed: int
    cap: float | None
    losses: list[float] = field(default_factory=list)
    edges: list[float] = field(default_factory=list)
    alarms: list[list[int]] = field(default_factory=lambda: [[] for _ in ABOVE])


def images_of() -> tuple[Tensor, Tensor]:
    """The images, and a row of ten targets for each."""
    x, y = images_and_labels()
    return x[:IMAGES], nn.functional.one_hot(y[:IMAGES], 10).float()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def train(kind: str, seed: int, cap: float | None) -> Run:
    torch.manual_seed(seed)
    x, y = images_of()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), optimizer=optimizer)
    run = Run(kind, seed, cap)
    for above, alarms in zip(ABOVE, run.alarms, strict=True):
        tracker.on_edge(lambda _, found=alarms: found.append(len(run.losses)), above=above)
    if cap is not None:
        lyapcuda.RateCap(optimizer, tracker, cap)
    for _ in range(STEPS):
        rows = torch.randperm(IMAGES)[: KINDS[kind]]

        def loss_of(rows: Tensor = rows) -> Tensor:
            return (model(x[rows]) - y[rows]).square().sum(1).mean()

        optimizer.zero_grad()
        loss = tracker.backward(loss_of)
        run.losses.append(float(loss))
        run.edges.append(float(tracker.edge))
        optimizer.step()
    return run


# --- spikes and alarms ----------------------------------------------------------------------------


def spikes(run: Run) -> list[range]:
    """From the first to the last step of each."""
    found: list[range] = []
    for step in range(BEFORE, len(run.losses)):
        if run.losses[step] > FACTOR * statistics.median(run.losses[step - BEFORE : step]):
            if found and step - found[-1].stop < BEFORE:
                found[-1] = range(found[-1].start, step + 1)
            else:
                found.append(range(step, step + 1))
    return found


def leads(run: Run, alarms: list[int]) -> list[int | None]:
    """Of each spike, how many steps before it the alarm came; None: it didn't."""
    out, free = [], BEFORE
    for spike in spikes(run):
        before = [a for a in alarms if max(free, spike.start - WITHIN) <= a < spike.start]
        out.append(spike.start - before[-1] if before else None)
        free = spike.stop
    return out


def judged(run: Run, alarms: list[int]) -> tuple[int, int]:
    """Alarms outside of spikes; how many of them were false."""
    found = spikes(run)
    free = [
        a for a in alarms if BEFORE <= a < STEPS - WITHIN and not any(a in spike for spike in found)
    ]
    false = [a for a in free if not any(a < s.start <= a + WITHIN for s in found)]
    return len(free), len(false)


# --- the report -----------------------------------------------------------------------------------


def lines_of(runs: list[Run]) -> list[str]:
    heads = ["Adam", "alarm above", "spikes", "warned of", "steps before: median, least, most"]
    heads += ["seeds with every spike warned of", "alarms", "false"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in KINDS:
        of = [run for run in runs if run.kind == kind and run.cap is None]
        for i, above in enumerate(ABOVE):
            each = [leads(run, run.alarms[i]) for run in of]
            every = [lead for run in each for lead in run]
            warned = [lead for lead in every if lead is not None]
            counts = [judged(run, run.alarms[i]) for run in of]
            cells = [kind, f"{above:g}", str(len(every)), str(len(warned))]
            cells.append(
                f"{statistics.median(warned):g}, {min(warned)}, {max(warned)}" if warned else "–"
            )
            having = [run for run in each if run]
            cells.append(f"{sum(None not in run for run in having)} of {len(having)}")
            cells += [str(sum(pair[j] for pair in counts)) for j in (0, 1)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| Adam | cap c | spikes | loss | largest edge, median of seeds |",
        "|---" * 5 + "|",
    ]
    for kind in KINDS:
        for cap in CAPS:
            of = [run for run in runs if run.kind == kind and run.cap == cap]
            if not of:
                continue
            last = [math.log(statistics.median(run.losses[-WITHIN:])) for run in of]
            most = statistics.median(max(run.edges[BEFORE:]) for run in of)
            cells = [kind, "none" if cap is None else f"{cap:g}"]
            cells += [str(sum(len(spikes(run)) for run in of))]
            cells += [f"{math.exp(statistics.fmean(last)):.2g}", f"{most:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


# --- the picture ----------------------------------------------------------------------------------


def draw(run: Run, alarm: int = ABOVE.index(1.0)) -> None:
    """Draws edge and loss of a run, with its alarms and spikes."""
    import matplotlib.pyplot as plt  # the report does without

    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(9.0, 4.4), height_ratios=[1.3, 1], layout="constrained"
    )
    top.plot(run.edges, color="C0", lw=1.2)
    top.axhline(1, color="C3", ls="--", lw=1.1)
    bottom.semilogy(run.losses, color="C2", lw=1.2)
    for i, spike in enumerate(spikes(run)):
        label = {"label": "loss above twice its median"} if i == 0 else {}
        bottom.axvspan(spike.start, spike.stop, color="C1", alpha=0.3, linewidth=0, **label)
    for i, step in enumerate(run.alarms[alarm]):
        label = {"label": "on_edge calls"} if i == 0 else {}
        for axes in (top, bottom):
            axes.axvline(step, color="black", lw=0.9, ls=":", **(label if axes is top else {}))
    top.set(ylabel="edge", ylim=(0.6, 1.15))
    bottom.set(xlabel="training step", ylabel="loss", xlim=(0, STEPS))
    for axes in (top, bottom):
        axes.legend(frameon=False, fontsize=9, loc="lower right" if axes is top else "upper right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="the picture alone")
    alone = parser.parse_args().draw
    torch.set_num_threads(1)
    runs = [train("full batch", 0, None)]
    draw(runs[0])
    for cap, kind, seed in () if alone else list(product(CAPS, KINDS, range(SEEDS)))[1:]:
        runs.append(train(kind, seed, cap))
        alarms = runs[-1].alarms[ABOVE.index(1.0)]
        print(kind, seed, cap, leads(runs[-1], alarms), judged(runs[-1], alarms), flush=True)
    if not alone:
        report("edge_spikes", "Whether the edge warns of loss spikes", __doc__, lines_of(runs))


if __name__ == "__main__":
    main()
