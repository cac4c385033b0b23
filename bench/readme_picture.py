"""Draws the README's picture: h0 of a net trained on full batches rises to 2/lr and stays there.

    python bench/readme_picture.py [--out docs/images/tracking.png]

The digits of scikit-learn, mean squared error, the net of examples/digits.py, gradient descent at a
learning rate of 0.5, one thread, seed 0. Takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from lyapcuda import CurvatureTracker

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from digits import images_and_labels, mlp  # noqa: E402
from examples.paper.config import LOSSES  # noqa: E402

LR, STEPS = 0.5, 700
WIDTH, HEIGHT, DPI = 9.0, 3.8, 100


def run() -> dict[str, np.ndarray]:
    """Train; returns h, its interval and the loss of every step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = images_and_labels()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = CurvatureTracker(model.parameters(), history=STEPS, model=model)

    def closure() -> Tensor:
        return LOSSES["mse"](model(x), y)

    for _ in range(STEPS):
        tracker.step(closure, leave_grad=True)
        optimizer.step()
    return {name: np.array(values) for name, values in tracker.history().columns().items()}


def draw(run: dict[str, np.ndarray], path: Path) -> None:
    """Draw h with its interval over 2/lr, and the loss beneath."""
    step = run["step"]
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(WIDTH, HEIGHT), height_ratios=[2.2, 1], layout="constrained"
    )
    top.fill_between(step, run["h_low"], run["h_high"], color="C0", alpha=0.25, linewidth=0)
    top.plot(step, run["h"], color="C0", linewidth=1.2)
    top.axhline(2 / LR, color="C3", linestyle="--", linewidth=1.2)
    near = 180  # a step, where the label has room
    top.annotate("2 / learning rate", (0, 2 / LR), (4, 5), textcoords="offset points", color="C3")
    top.annotate(
        "h0, with its interval",
        (near, run["h"][near]),
        (12, -10),
        textcoords="offset points",
        color="C0",
    )
    top.set(ylabel="largest eigenvalue", ylim=(0, 2.75 / LR))
    bottom.semilogy(step, run["loss"], color="C2", linewidth=1.2)
    bottom.set(xlabel="training step", ylabel="loss", xlim=(0, STEPS))
    bottom.set_yticks([0.02, 0.05, 0.1], ["0.02", "0.05", "0.1"])
    bottom.minorticks_off()
    figure.align_ylabels()
    for axes in (top, bottom):
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "tracking.png")
    draw(run(), parser.parse_args().out)


if __name__ == "__main__":
    main()
