"""h0 along a training run beside its exact value: CIFAR-10 planes/cars, MLP, learning rate 0.1.

    python bench/cifar_mlp.py DIR [--out bench/results/NAME] [--device cpu]

DIR is a CIFAR-10 folder. One epoch (19 steps of 512 pictures), SGD without
momentum, weight decay 5e-4, cross-entropy. Before it, the trackers see --warm minibatches at the
initial θ, without training, as in the paper. At ten of the steps the largest eigenvalue of the
Hessian of that minibatch's loss is computed by Lanczos (scipy's eigsh) on exact Hessian-vector
products (double backward), with the weight decay in it; at the same steps the finite-size curvature
at the tracker's own Δq is computed to convergence on the frozen minibatch. The trackers see a new
minibatch at every step, as in training: they lag and average.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import lyapcuda
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader, load  # noqa: E402
from examples.paper.models import build  # noqa: E402

DECAY, LR, BATCH = 5e-4, 0.1, 512
TRACKERS = {
    "h, automatic Δq": dict(estimate="rayleigh"),
    "h, Δq = 0.05": dict(estimate="rayleigh", perturbation=5e-2),
    "growth, Δq = 0.05": dict(estimate="growth", perturbation=5e-2),
    "paper (Algorithm 1, Δq = 0.05)": dict(estimate="paper", perturbation=5e-2),
}


def exact_top(
    loss: Callable[[], Tensor], parameters: list[Tensor], **options: Any
) -> tuple[float, np.ndarray]:
    """Largest eigenvalue of the Hessian plus DECAY and its vector, by Lanczos on exact products."""
    sizes = [p.numel() for p in parameters]
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.as_tensor(vector, dtype=torch.float32).split(sizes)
        inner = sum((g * v.view_as(g)).sum() for g, v in zip(gradient, parts, strict=True))
        rows = torch.autograd.grad(inner, parameters, retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).double().numpy()

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
    (value,), vectors = eigsh(operator, k=1, which="LA", **{"tol": 1e-4, **options})
    return float(value) + DECAY, vectors[:, 0]


def exact_h0(loss: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    """Largest eigenvalue of the Hessian plus DECAY."""
    return exact_top(loss, parameters)[0]


def frozen(loss: Callable[[], Tensor], model: nn.Module, steps: int, **options) -> float:
    """What the tracker converges to when the minibatch and θ stay: Δq's own curvature."""
    tracker = lyapcuda.CurvatureTracker(model.parameters(), weight_decay=DECAY, **options)
    for _ in range(steps):
        tracker.step(loss)
    last = []
    for _ in range(10):
        tracker.step(loss)
        last.append(float(tracker.h))
    return statistics.fmean(last)


def run(folder: str, activation: type[nn.Module], points: int, warm: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    dataset = load(folder, (0, 1))
    model = build("mlp", dataset.in_channels, dataset.image_size, 2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, activation())
    loader = BatchLoader(dataset, BATCH, seed=0, augment=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    trackers = {
        name: lyapcuda.CurvatureTracker(model.parameters(), weight_decay=DECAY, **options)
        for name, options in TRACKERS.items()
    }
    for _ in range(warm):
        images, labels = loader.next()
        for tracker in trackers.values():
            tracker.step(lambda: nn.functional.cross_entropy(model(images), labels))  # noqa: B023
    steps = loader.steps_per_epoch
    wanted = {round(p) for p in np.linspace(0, steps - 1, points)}
    rows = []
    for step in range(steps):
        images, labels = loader.next()

        def loss(images=images, labels=labels) -> Tensor:
            return nn.functional.cross_entropy(model(images), labels)

        for tracker in trackers.values():
            value = tracker.step(loss)
        if step in wanted:
            row = {"step": step, "loss": float(value)}
            row["exact"] = exact_h0(loss, list(model.parameters()))
            row["converged, automatic Δq"] = frozen(loss, model, 60)
            row |= {name: float(tracker.h) for name, tracker in trackers.items()}
            row["low"], row["high"] = trackers["h, automatic Δq"].interval.tolist()
            rows.append(row)
            print({k: round(v, 4) for k, v in row.items()}, flush=True)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return rows


def table(title: str, rows: list[dict[str, float]]) -> list[str]:
    names = list(rows[0])
    lines = [f"## {title}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(f"{row[name]:.4g}" for name in names) + " |" for row in rows]
    heading = "Over the exact value, median of the steps after the first two (1 would be exact):"
    lines += ["", heading, ""]
    for name in ("converged, automatic Δq", *TRACKERS):
        ratios = [row[name] / row["exact"] for row in rows[2:]]
        lines.append(f"- {name}: {statistics.median(ratios):.3f}")
    inside = sum(row["low"] <= row["exact"] <= row["high"] for row in rows)
    return [*lines, f"- exact h0 inside the interval: {inside} of {len(rows)}", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--warm", type=int, default=19, help="minibatches before training")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cifar_mlp"))
    arguments = parser.parse_args()
    lines = ["# h0 beside its exact value", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}; --warm {arguments.warm}.", ""]
    for title, activation in (("MLP with ReLU", nn.ReLU), ("The same with GELU", nn.GELU)):
        rows = run(arguments.folder, activation, arguments.points, arguments.warm)
        lines += table(title, rows)
        path = arguments.out.with_name(f"{arguments.out.name}_{activation.__name__.lower()}.csv")
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    arguments.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
