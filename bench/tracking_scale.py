"""A tracker's h0 at one θ as a function of Δq, on nets of real size.

    python bench/tracking_scale.py [--data DIR] [--problems mlp_gelu ...] [--out FILE]

The smooth problems of bench/peers.py (DIR as there), frozen, with their one batch. Δq is
c·ε^(1/3)·‖θ‖/N^(1/4), or what a tracker takes by default: on a smooth loss, and where it can't see
that it is (a closure that returns a float). The truth comes from exact products (for the GPT with
attention by its plain formula). Reported after --steps steps: the error of h, whether the interval
holds h0, and that of the one-sided Rayleigh quotient.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch

import lyapcuda
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.params.flat import FlatLayout
from ops import cpu_name
from peers_problems import Problem, attention, load, prepare

PROBLEMS = ("mlp_gelu", "gpt", "resnet18_gelu")
FACTORS = (3.0, 1.5, 0.75, 0.4, 0.2, 0.1, 0.05)
HEAD = "| problem | Δq | error of h | interval holds h0 | error on one side |"


def rows(name: str, problem: Problem, steps: int) -> list[str]:
    with attention(name, math=True):
        exact = lyapcuda.eigsh(
            problem.loss, problem.parameters, 1, mode="exact", tol=1e-5, model=problem.model
        )
    h0 = float(exact.eigenvalues[0])
    layout = FlatLayout(problem.parameters)
    epsilon = layout.epsilon()
    unit = epsilon ** (1.0 / 3.0) * layout.norm() / layout.numel**0.25
    sizes = [
        ("default, not seen to be smooth", default_perturbation(layout)),
        ("default", None),
        *((f"c = {factor:g}", factor * unit) for factor in FACTORS),
    ]
    lines = []
    for title, size in sizes:
        problem.reset()
        tracker = lyapcuda.CurvatureTracker(problem.parameters, perturbation=size)
        for _ in range(steps):
            tracker.step(problem.loss)
        low, high = tracker.interval.tolist()
        used = default_perturbation(layout, smooth=True) if size is None else size
        off, one_side = (abs(float(value) / h0 - 1) for value in (tracker.h, tracker.rayleigh))
        holds = "yes" if low <= h0 <= high else "**no**"
        lines.append(
            f"| {problem.spec.title} | {title}: {used:.1e} | {off:.1e} | {holds} | {one_side:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the small ones warn, as they should
    title, *about = __doc__.splitlines()
    report = [f"# {title[:-1]}", "", *about[3:], ""]
    report += [f"{arguments.steps} steps. Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    report += [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.problems:
            path = Path(folder) / name
            prepare(name, arguments.data, path)
            report += rows(name, load(name, path), arguments.steps)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
