"""How the Schwarz and the Rayleigh quotient depend on Δq, on smooth nets and on one with kinks.

    python bench/schwarz_perturbation.py DIR

DIR is a CIFAR-10 folder (planes and cars). After 60 steps of SGD at batch
512 a minibatch is frozen, a tracker settles on it at the default Δq, and takes four more steps at
each size: of their quotients, on both sides of θ in turns, the least and the largest are reported,
over the largest eigenvalue of the exact Hessian (Lanczos, double backward).
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import lyapcuda
from cifar_mlp import BATCH, DECAY, exact_top
from ops import cpu_name
from tracking_accuracy import smooth

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader, load  # noqa: E402
from examples.paper.models import build  # noqa: E402

CASES = (("mlp", "GELU", 0.03), ("mlp", "ReLU", 0.03), ("lenet1", "GELU", 0.05))
PARTS = (1.0, 0.3, 0.1, 0.03)


def quotients(name: str, activation: str, lr: float, folder: str) -> list[str]:
    torch.manual_seed(1)
    dataset = load(folder, (0, 1))
    model = build(name, dataset.in_channels, dataset.image_size, 2)
    if activation == "GELU":
        torch.manual_seed(1)
        model = smooth(name, dataset)
    loader = BatchLoader(dataset, BATCH, seed=1, augment=True)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr, weight_decay=DECAY)
    for _ in range(60):
        images, labels = loader.next()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = loader.next()

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    exact, _ = exact_top(loss, parameters, ncv=8, tol=1e-3)
    settled = lyapcuda.CurvatureTracker(parameters, weight_decay=DECAY)
    for _ in range(20):
        settled.step(loss)
    lines = []
    for part in PARTS:
        state = settled.state_dict()
        lyapcuda.ops.state_field(state["separations"][0]["state"], 1, "perturbation").mul_(part)
        tracker = lyapcuda.CurvatureTracker(parameters, weight_decay=DECAY)
        tracker.load_state_dict(state)
        tracker.step(loss)  # still at the old size
        rows = []
        for _ in range(4):
            tracker.step(loss)
            rows.append((float(tracker.schwarz) / exact, float(tracker.rayleigh) / exact))
        spans = " | ".join(f"{min(c):.3f}–{max(c):.3f}" for c in zip(*rows, strict=True))
        lines.append(f"| {name}, {activation} | {part} | {spans} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    lines = ["| net | Δq over the default | Schwarz/exact | Rayleigh/exact |", "|---" * 4 + "|"]
    for case in CASES:
        lines += quotients(*case, sys.argv[1])
    machine = f"Machine: {cpu_name()}, torch {torch.__version__}."
    text = ["# The Schwarz quotient and Δq", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    path = Path(__file__).parent / "results" / "schwarz_perturbation.md"
    path.write_text("\n".join([*text, machine, "", *lines, ""]))


if __name__ == "__main__":
    main()
