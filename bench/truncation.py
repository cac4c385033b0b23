"""What differences of gradients are worth on nets whose curvature changes over short distances.

    python bench/truncation.py [--data DIR] [--problems mlp_gelu ...] [--out FILE]

The problems of bench/peers.py (DIR as there). The leading eigenpair comes from exact products (for
the GPT with attention by its plain formula); along it, the length is the distance over which the
curvature changes by as much as it is (lyapcuda.solvers.difference_error). Then eigsh, k = 1,
tol = 1e-3, with the Δq that the parameters' size and precision advise, given as `perturbation`, so
that nothing checks it; and as it is by default, where the truncation error is measured along the
vector that was found, and Δq follows.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch

import lyapcuda
from lyapcuda.basis import Basis
from lyapcuda.dynamics.perturbation import separation_size
from lyapcuda.solvers.difference_error import truncation_along
from ops import cpu_name
from peers_problems import Problem, attention, load, prepare

PROBLEMS = ("mlp_gelu", "gpt", "resnet18_gelu")
HEAD = (
    "| problem | loss | length / ‖θ‖ | Δq | differences | gradients | error | called converged | "
    "interval holds h0 |"
)


def solve(problem: Problem, **options: object) -> lyapcuda.EigenResult:
    problem.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        options = {"mode": "difference", **options}
        return lyapcuda.eigsh(problem.loss, problem.parameters, 1, model=problem.model, **options)


def length(operator: lyapcuda.HessianOperator, vector: torch.Tensor, h0: float) -> float:
    """Over which the curvature along a vector changes by as much as it is, in units of ‖θ‖."""
    pair = Basis.empty(operator.layout, 2)
    operator.layout.scatter(vector, pair.row(0))
    operator.look()  # which chooses Δq
    found = truncation_along(operator, pair[:1], pair[1:], h0, residual=0.0, tol=1e-3)
    return found.length / operator.layout.norm()


def rows(name: str, problem: Problem, loss: float) -> list[str]:
    with attention(name, math=True):
        exact = solve(problem, mode="exact", tol=1e-5)
    h0 = float(exact.eigenvalues[0])
    operator = lyapcuda.HessianOperator(
        problem.loss, problem.parameters, model=problem.model, mode="difference"
    )
    start = f"| {problem.spec.title} | {loss:.3g} | "
    start += f"{length(operator, exact.eigenvectors[0], h0):.1e} | "
    lines = []
    for title, options in (
        *(
            ("advised", dict(difference=d, perturbation=separation_size(operator.layout, d)))
            for d in ("forward", "central")
        ),
        ("measured", {}),
    ):
        found = solve(problem, **options)
        low, high = found.interval[0].tolist()
        holds = "yes" if low <= h0 <= high else "**no**"
        lines.append(
            f"{start}{title}: {found.perturbation:.1e} | {found.difference} | "
            f"{found.gradient_evaluations} | {abs(float(found.eigenvalues[0]) - h0) / h0:.1e} | "
            f"{'yes' if found.converged[0] else 'no'} | {holds} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    title, *about = __doc__.splitlines()
    report = [f"# {title[:-1]}", "", *about[3:]]
    report += ["", f"Machine: {cpu_name()}, torch {torch.__version__}.", "", HEAD]
    report.append("|" + "---|" * (HEAD.count("|") - 1))
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.problems:
            path = Path(folder) / name
            made = prepare(name, arguments.data, path)
            print(name, made, flush=True)
            report += rows(name, load(name, path), float(made["loss"]))
    if arguments.out:
        arguments.out.with_suffix(".md").write_text("\n".join(report) + "\n")


if __name__ == "__main__":
    main()
