"""Tracks the curvature of a small net's loss while it learns handwritten digits.

    python examples/tracking.py --out runs/quickstart

Writes run.csv, a row a step, and its picture run.png. h0 is the largest eigenvalue of the Hessian,
the edge the learning rate times h0/2: above 1 a step overshoots. Training raises h0 until the edge
is 1, and holds it there; as the rate falls at the end, h0 is free.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import mse_loss, one_hot
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import trange

from digits import images_and_labels, mlp
from lyapcuda import CurvatureLog, CurvatureTracker
from lyapcuda.plots.run import read_run, save_run

BATCH, TRAIN, TEST = 512, slice(1437), slice(1437, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    (x, y), model = images_and_labels(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rise, fall = args.steps // 6, args.steps * 3 // 5
    parts = LinearLR(optimizer, 0.01, 1.0, rise), CosineAnnealingLR(optimizer, args.steps - fall)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scheduler = SequentialLR(optimizer, [parts[0], constant, parts[1]], [rise, fall])
    tracker = CurvatureTracker(model, optimizer=optimizer)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return mse_loss(model(x[rows]), one_hot(y[rows], 10).float())

    lr = {"lr": lambda: optimizer.param_groups[0]["lr"]}
    with CurvatureLog(tracker, args.out / "run.csv", values=lr, mode="w"):
        for _ in trange(args.steps, unit="step", disable=args.no_progress):
            optimizer.zero_grad()
            loss = tracker.backward(partial(loss_of, torch.randperm(len(y[TRAIN]))[:BATCH]))
            optimizer.step()
            scheduler.step()
    save_run(read_run(args.out / "run.csv"), args.out / "run.png")
    right = (model(x[TEST]).argmax(1) == y[TEST]).double().mean()
    h = f"h0 {tracker.h:.3g} ± {tracker.h_error:.1g}, see {args.out / 'run.png'}"
    print(f"step {tracker.calls}: loss {loss:.3g}, test accuracy {right:.1%}, {h}")


if __name__ == "__main__":
    main()
