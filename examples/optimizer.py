"""Trains a small net with LyapunovSGD, whose learning rate follows the curvature it measures.

    python examples/optimizer.py --out runs/optimizer

Prints the losses of the epochs beside those of SGD at two rates, and draws losses.png. A step of
LyapunovSGD costs two gradients, a step of SGD one. It needs no rate to be found first.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from digits import images_and_labels, mlp
from lyapcuda import LyapunovSGD
from pictures import draw_losses

OPTIMIZERS = {
    "SGD, lr 0.1": partial(torch.optim.SGD, lr=0.1),
    "SGD, lr 0.3": partial(torch.optim.SGD, lr=0.3),
    "LyapunovSGD": LyapunovSGD,
}


def train(name: str, epochs: int) -> list[float]:
    torch.manual_seed(0)
    x, y = images_and_labels()
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())

    def closure(rows: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        return loss.detach()

    def epoch() -> float:
        batches = torch.randperm(len(y)).split(128)[:14]
        return float(sum(optimizer.step(partial(closure, rows)) for rows in batches)) / 14

    return [epoch() for _ in range(epochs)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/optimizer"))
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    losses = {name: train(name, args.epochs) for name in OPTIMIZERS}
    for name, values in losses.items():
        print(f"{name}:", *(f"{loss:.3f}" for loss in values))
    draw_losses(losses, args.out / "losses.png")


if __name__ == "__main__":
    main()
