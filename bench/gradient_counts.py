"""How many gradients eigsh needs on the CIFAR-10 MLP, held against a tight reference.

    python bench/gradient_counts.py DIR [--ncv 8 11 ...] [--out bench/results/gradient_counts]

DIR is a CIFAR-10 folder. The MLP with three hidden layers of 200: with
ReLU on planes and cars (695,002 parameters) and with GELU on the same two classes and on all ten;
one frozen batch of 512, cross-entropy, at initialisation and after --steps steps of SGD (learning
rate 0.1). The reference is scipy's eigsh (ARPACK) to 1e-6 over exact products (double
backward); for the ReLU net also over the finite-scale operator itself (central differences at the
Δq that eigsh took), since kinks put a curvature into any difference that the Hessian doesn't have.

Reported are the gradient evaluations, g(θ) among them,

- true: until every one of the k values is within 1e-3 (relative) of the reference and stays there;
- stop: until eigsh stopped of itself, its largest relative error then, and whether it called all
  values converged.

ncv: vectors that Lanczos keeps, where that was asked for.

Goals: true ≤ 8 for k = 1, ≤ 27 for k = 5.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

import lyapcuda
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader, load  # noqa: E402
from examples.paper.models import build  # noqa: E402

BATCH, LR, TOL, KS = 512, 0.1, 1e-3, (1, 5)
NETS = {
    "ReLU, 2 classes": (nn.ReLU, (0, 1)),
    "GELU, 2 classes": (nn.GELU, (0, 1)),
    "GELU, 10 classes": (nn.GELU, None),
}


def states(
    folder: str, activation: type[nn.Module], classes: tuple[int, ...] | None, steps: int
) -> Iterator[tuple[str, nn.Module, Callable[[], Tensor]]]:
    """The net at initialisation, and after training; the loss of one batch."""
    torch.manual_seed(0)
    dataset = load(folder, classes) if classes else load(folder)
    model = build("mlp", dataset.in_channels, dataset.image_size, len(classes or range(10)))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, activation())
    loader = BatchLoader(dataset, BATCH, seed=0, augment=True)
    images, labels = loader.next()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    yield "at initialisation", model, loss
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        batch, targets = loader.next()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), targets).backward()
        optimizer.step()
    yield f"after {steps} steps", model, loss


def reference(operator: lyapcuda.HessianOperator) -> np.ndarray:
    """The largest eigenvalues, descending, to 1e-6."""
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    with operator.keeping_graph():
        values = eigsh(
            operator.to_scipy(), max(KS), which="LA", tol=1e-6, v0=start, return_eigenvectors=False
        )
    return np.sort(values)[::-1]


def first_right(result: lyapcuda.EigenResult, exact: np.ndarray) -> int | None:
    """Gradients until every value is right and stays so; None where the last one is not."""
    right = None
    for entry in reversed(result.history):
        values = np.array(entry["eigenvalues"])
        if len(values) < len(exact) or (abs(values / exact - 1) > TOL).any():
            break
        right = entry["gradient_evaluations"]
    return right


def rows_of(
    net: str,
    state: str,
    model: nn.Module,
    loss: Callable[[], Tensor],
    seeds: range,
    runs: Sequence[tuple[str, int | None]],
) -> list[str]:
    """Table rows of one state: methods (and ncv), k, truths."""
    params = list(model.parameters())
    exact = reference(lyapcuda.HessianOperator(loss, params, mode="exact"))
    rows, finite = [], {}
    for method, ncv in runs:
        for k in KS:
            if ncv is not None and ncv <= k:
                continue
            results = [
                lyapcuda.eigsh(
                    loss,
                    params,
                    k,
                    mode="difference",
                    method=method,
                    ncv=ncv,
                    tol=TOL,
                    seed=seed,
                )
                for seed in seeds
            ]
            truths = {"exact": exact[:k]}
            first = results[0]
            if net.startswith("ReLU"):
                size = first.perturbation
                if size not in finite:
                    options = dict(difference="central", perturbation=size)
                    finite[size] = reference(lyapcuda.HessianOperator(loss, params, **options))
                truths[f"at Δq = {size:.2g}"] = finite[size][:k]
            for name, truth in truths.items():
                right = [first_right(result, truth) for result in results]
                errors = [
                    float(abs(result.eigenvalues.numpy() / truth - 1).max()) for result in results
                ]
                called = method if ncv is None else f"{method}, ncv={ncv}"
                cells = [net, state, called, first.difference, str(k), name]
                cells += [f"{truth[0]:.5g}", span(right)]
                cells += [span([result.gradient_evaluations for result in results])]
                cells += [f"{max(errors):.1e}"]
                sure = sum(bool(result.converged.all()) for result in results)
                cells += [f"{sure} of {len(results)}"]
                rows.append("| " + " | ".join(cells) + " |")
                print(rows[-1], flush=True)
    return rows


def span(numbers: list[int | None]) -> str:
    """Median, and the range where there is one."""
    if any(number is None for number in numbers):
        return f"never ({numbers.count(None)} of {len(numbers)})"
    low, high = min(numbers), max(numbers)
    middle = statistics.median(numbers)
    return f"{middle:g}" if low == high else f"{middle:g} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="random start vectors")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/gradient_counts"))
    parser.add_argument("--ncv", type=int, nargs="+", help="Lanczos alone, with each of these")
    arguments = parser.parse_args()
    runs = [("lanczos", None)]
    if arguments.ncv:
        runs = [("lanczos", ncv) for ncv in arguments.ncv]
    warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
    heading = (
        "| net | state | method | differences | k | reference | h0 | true | stop | error | sure |"
    )
    lines = ["# Gradients to a thousandth on the CIFAR-10 MLP", ""]
    lines += [__doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [
        f"Machine: {cpu_name()}, torch {torch.__version__}; medians (and ranges) of "
        f"{arguments.seeds} start vectors. sure: runs that called all values converged.",
        "",
        heading,
        "|---" * 11 + "|",
    ]
    for net in arguments.nets:
        for state, model, loss in states(arguments.folder, *NETS[net], arguments.steps):
            lines += rows_of(net, state, model, loss, range(arguments.seeds), runs)
            # What there is is kept: a state takes minutes.
            arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
