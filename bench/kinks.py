"""How far differences of gradients on both sides of θ part, where the loss is smooth and on kinks.

    python bench/kinks.py [--out bench/results/kinks]

A net of 64-100-100-10 on clusters of noise, cross-entropy, float32, 200 and 4,000 samples, at
initialisation and after 100 steps of gradient descent. Along a random vector mixed with g(θ), at
several Δq (1 is that of a forward difference): the spread, half of the distance of y₊ and y₋; the
offset, how far their mean is from the exact product Hu; both relative to it. "wrong": the same net
with a custom tanh whose double backward misses a term, so that Hu itself is off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lyapcuda
from lyapcuda.basis import Basis
from lyapcuda.solvers.agreement import both_sides
from ops import cpu_name

SHARES = (16.0, 4.0, 1.0, 0.25)


class _WrongTanh(torch.autograd.Function):
    """Keeps its derivative as a constant."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.slope = 1.0 - x.tanh().square()
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope


class _Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _WrongTanh.apply(x)


def row(title: str, act: Callable[[], nn.Module], samples: int, steps: int) -> str:
    """Spread and offset at each Δq, as a row of the table."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (samples,))
    inputs = torch.randn(10, 64)[labels] + torch.randn(samples, 64)
    layers = [nn.Linear(64, 100), act(), nn.Linear(100, 100), act(), nn.Linear(100, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(inputs), labels)

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    operator = lyapcuda.HessianOperator(loss, model.parameters(), mode="exact")
    rows = Basis.empty(operator.layout, 2)
    rows.randomise_(0, [torch.Generator().manual_seed(0)])
    gradient = operator.gradient()[0]
    u, hu = rows[:1], rows[1:]
    u.row(0)[0].div_(u.row(0)[0].norm()).add_(gradient / gradient.norm())
    operator.product(u.row(0), hu.row(0))
    norm = u.gram(u)[0, 0].sqrt()
    cells = []
    for share in SHARES:
        size = share * operator.usual_perturbation
        found = both_sides(operator.products, u, hu, norm, size)
        cells.append(f"{found.spread:.2g}, {found.offset:.2g}")
    return f"| {title} | {samples} | {steps} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/kinks"))
    arguments = parser.parse_args()
    lines = ["# Differences on both sides of θ", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    titles = " | ".join(f"Δq {share:g}: spread, offset" for share in SHARES)
    lines += [f"| | samples | steps | {titles} |", "|---" * (3 + len(SHARES)) + "|"]
    for title, act in (("GELU", nn.GELU), ("ReLU", nn.ReLU), ("wrong", _Wrong)):
        for samples in (200, 4000):
            lines += [row(title, act, samples, steps) for steps in (0, 100)]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
