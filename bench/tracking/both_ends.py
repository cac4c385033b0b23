"""Three eigenvalues of both ends as tracked under a fast AdamW, beside the minibatch's exact ones.

    python bench/tracking/both_ends.py [--modes default tol=0.1,iterations=4]

A character transformer (bench/gpt.py: 2 blocks of width 32, 4 heads; 16 pieces of 32 characters of
Python's help), AdamW at 1e-2, 150 steps, seeds 11 and 12. Trackers with k=3, which="BE" measure
every minibatch. At every tenth step the two largest and the smallest eigenvalue of the Hessian of
the minibatch's loss are computed by scipy's Lanczos on exact products (double backward, attention
by its plain formula, there as in training).

Reported for each of the three: the range of the exact values, the medians of exact and tracked
ones, and as in minibatches.py the errors over the steps of both runs. (Of the smallest, the Schwarz
quotient errs outward wherever the vector is not an eigenvector: h is to be compared.)
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import lyapcuda  # noqa: E402
from gpt import GPT, loss_of  # noqa: E402
from tracking.readings import (  # noqa: E402
    DEFAULT,
    ERRORS,
    RESULTS,
    Known,
    Modes,
    Row,
    errors,
    keep,
    known,
    load,
    modes_of,
    read,
    recall,
    table,
)
from tracking.text import characters, pieces  # noqa: E402

CSV = RESULTS / "tracking_both_ends.csv"
SEEDS = (11, 12)
STEPS, APART = 150, 10
RATE, BATCH, LENGTH, WIDTH, HEADS, DEPTH = 1e-2, 16, 32, 32, 4, 2
#: Which eigenvalues, in the tracker's order, and what the median error should not exceed.
VALUES, GOAL = ("largest", "second", "smallest"), 0.2


def exact_ends(loss: Tensor, parameters: list[Tensor]) -> list[float]:
    """The two largest eigenvalues and the smallest, by Lanczos on exact products."""
    sizes = [p.numel() for p in parameters]
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.as_tensor(vector, dtype=torch.float32).split(sizes)
        directions = [v.view_as(p) for v, p in zip(parts, parameters, strict=True)]
        rows = torch.autograd.grad(gradient, parameters, directions, retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).double().numpy()

    size = sum(sizes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    options = {"tol": 1e-3, "return_eigenvectors": False}
    options["v0"] = np.random.default_rng(0).standard_normal(size)
    largest = eigsh(operator, k=2, which="LA", **options)
    smallest = eigsh(operator, k=1, which="SA", **options)
    return [*sorted(map(float, largest), reverse=True), float(smallest[0])]


def train(seed: int, modes: Modes, found: Known) -> list[Row]:
    """A training run: a row a mode and value at every step with exact values."""
    title = f"seed {seed}"
    text, vocabulary = characters()
    torch.manual_seed(seed)
    model = GPT(vocabulary, LENGTH, WIDTH, HEADS, DEPTH)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    trackers = {
        mode: lyapcuda.CurvatureTracker(parameters, k=len(VALUES), which="BE", **options)
        for mode, options in modes.items()
    }
    rows = []
    batches = pieces(text, BATCH, LENGTH, seed)
    for step, batch in zip(range(STEPS), batches, strict=False):

        def closure(batch: Tensor = batch) -> Tensor:
            return loss_of(model, batch)

        exact = None
        if step and (step % APART == 0 or step == STEPS - 1):
            loss = closure()
            exact = recall(found, title, step, loss) or exact_ends(loss, parameters)
        optimizer.zero_grad()
        for i, (mode, tracker) in enumerate(trackers.items()):
            # One of them gives the gradient of training, the others leave no trace.
            loss = tracker.step(closure) if i else tracker.backward(closure)
            if exact is not None:
                rows += read(tracker, title, mode, step, loss, exact)
        optimizer.step()
    return rows


def report(rows: list[Row]) -> list[str]:
    lines = []
    for i, name in enumerate(VALUES):
        for mode in dict.fromkeys(row.mode for row in rows):
            mine = [row for row in rows if row.mode == mode and row.value == i]
            exact = [row.exact for row in mine]
            medians = [statistics.median(x) for x in (exact, [row.h for row in mine])]
            cells = [f"{min(exact):.3g} to {max(exact):.3g}", *(f"{x:.3g}" for x in medians)]
            cells += [str(len(mine)), errors(mine), f"{GOAL:.0%}"]
            lines.append(f"| {name} | {mode} | {' | '.join(cells)} |")
    return table(
        f"value | mode | exact | its median | median of h | steps | {ERRORS} | goal", lines
    )


def measured(modes: Modes | None = None, *, again: bool = True) -> list[str]:
    """Trains and writes the CSV (``again=False``: only reads it); the report's lines."""
    for seed in SEEDS if again else ():
        with sdpa_kernel(SDPBackend.MATH):
            keep(CSV, train(seed, modes or modes_of(), known(CSV)))
    return report(load(CSV))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="+", metavar="MODE", default=[DEFAULT])
    parser.add_argument("--report", action="store_true", help="on the CSV again, without training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(measured(modes_of(arguments.modes), again=not arguments.report)))


if __name__ == "__main__":
    main()
