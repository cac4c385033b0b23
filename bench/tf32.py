"""What TF32 does to eigsh and to a tracker's Δq, emulated on the CPU in forward and backward pass.

    python bench/tf32.py [--out bench/results/tf32.md]

First eigsh on small smooth nets (tests/support/nets.py, cross-entropy), against the dense Hessian
in float64: with TF32 in all products, unknown to the package and known to it, and in plain float32.
Then a tracker's h0 at one θ by Δq, on nets trained for ten steps, against exact products in
float32: the largest error among steps 50 to 90. `(!)`: an interval held no such eigenvalue.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

import lyapcuda
from lyapcuda.objective import tf32
from lyapcuda.params.flat import FlatLayout
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import precision_cases as cases  # noqa: E402

ARITHMETIC = {
    "TF32, unknown": lambda: cases.tf32(known=False),
    "TF32": cases.tf32,
    "float32": nullcontext,
}
# Δq in ε^(1/3)·‖θ‖/√N; None: ε^(1/3)·‖θ‖/4.
SIZES = (None, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)


def eigsh_rows() -> list[str]:
    rows = ["| net | k | arithmetic | error / h0 | converged | gradients |", "|---" * 6 + "|"]
    for name in ("gelu_mlp", "conv", "tanh_mlp"):
        for k in (1, 3):
            for title, during in ARITHMETIC.items():
                case = cases.problem(name)
                with during():
                    found = lyapcuda.eigsh(
                        case.closure, case.model.parameters(), k, mode="difference"
                    )
                exact = case.eigenvalues.flip(0)[:k]
                low, high = found.interval[:, :1], found.interval[:, 1:]
                held = ((case.eigenvalues >= low) & (case.eigenvalues <= high)).any(1).all()
                off = float((found.eigenvalues - exact).abs().max() / exact[0])
                cells = (name, k, title, f"{off:.1e}" + ("" if held else " (!)"))
                cells += (f"{int(found.converged.sum())} of {k}", found.gradient_evaluations)
                rows.append("| " + " | ".join(map(str, cells)) + " |")
                print(rows[-1], flush=True)
    return rows


def mlp(width: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(256, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv(channels: int) -> nn.Module:
    layers = [nn.Conv2d(1, channels, 3, stride=2), nn.GELU()]
    layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(18 * channels, 10))


def tracker_row(make: Callable[[int], nn.Module], size: int) -> str:
    torch.manual_seed(0)
    model, x = make(size), torch.randn(10, 1, 16, 16)
    y = torch.randint(0, 10, (128,))
    x = x[y] + torch.randn(128, 1, 16, 16)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    parameters = list(model.parameters())
    optimizer.zero_grad()
    h0 = float(lyapcuda.eigsh(loss, parameters, 1, mode="exact", tol=1e-5).eigenvalues[0])
    layout = FlatLayout(parameters)
    unit, cells = tf32.EPSILON ** (1 / 3) * layout.norm(), []
    for factor in SIZES:
        share = 0.25 if factor is None else factor / math.sqrt(layout.numel)
        tracker = lyapcuda.CurvatureTracker(parameters, perturbation=share * unit)
        errors = []
        with cases.tf32():
            for _ in range(90):
                tracker.step(loss)
                errors.append(abs(float(tracker.h) / h0 - 1))
        low, high = tracker.interval.tolist()
        cells.append(f"{max(errors[50:]):.0e}" + ("" if low <= h0 <= high else " (!)"))
    row = f"| {make.__name__} {size} | {layout.numel} | " + " | ".join(cells) + " |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    title, *about = __doc__.splitlines()
    report = [f"# {title[:-1]}", "", *about[3:], ""]
    report += [f"Machine: {cpu_name()}, torch {torch.__version__}.", "", *eigsh_rows(), ""]
    sizes = ["ε^(1/3)·‖θ‖/4" if s is None else f"{s:g}·ε^(1/3)·‖θ‖/√N" for s in SIZES]
    report += ["| net | N | " + " | ".join(sizes) + " |", "|---" * (2 + len(sizes)) + "|"]
    nets = [(conv, 2), (mlp, 4), (conv, 6), (mlp, 12), (conv, 16), (mlp, 40)]
    report += [tracker_row(*net) for net in nets]
    if arguments.out:
        arguments.out.write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
