"""Tracks the curvature of a small net's loss while it learns handwritten digits.

    python examples/tracking.py --out runs/quickstart

Writes run.csv, a row a step, and its picture run.png. h0 is the largest eigenvalue of the loss's
Hessian. λ is the exponent of the ascent that finds it, and is held near a constant. The edge is the
learning rate times h0/2: gradient descent on a quadratic loss is stable while it is below 1.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import trange

from digits import images_and_labels, mlp
from lyapcuda import CurvatureLog, CurvatureTracker
from pictures import draw_run

BATCH, BATCHES = 128, 11  # of an epoch
TRAIN, TEST = slice(1437), slice(1437, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    x, y = images_and_labels()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    tracker = CurvatureTracker(model, optimizer=optimizer)
    lr = {"lr": lambda: optimizer.param_groups[0]["lr"]}

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(x[rows]), y[rows])

    with CurvatureLog(tracker, args.out / "run.csv", values=lr, mode="w"):
        for _ in trange(args.epochs, unit="epoch", disable=args.no_progress):
            for rows in torch.randperm(len(y[TRAIN])).split(BATCH)[:BATCHES]:
                optimizer.zero_grad()
                loss = tracker.backward(partial(loss_of, rows))
                optimizer.step()
    draw_run(args.out / "run.csv", args.out / "run.png")

    right = (model(x[TEST]).argmax(1) == y[TEST]).double().mean()
    low, high = tracker.interval
    h = f"h0 {tracker.h:.4g} (an eigenvalue in [{low:.4g}, {high:.4g}]), edge {tracker.edge:.2g}"
    print(f"step {tracker.calls}: loss {loss:.4g}, test accuracy {right:.2%}, {h}")


if __name__ == "__main__":
    main()
