"""LOBPCG over flat buffers, in constant memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lyapcuda.solvers.basis import MAX_ROWS, Basis, Product, Report, Solution, on_host
from lyapcuda.solvers.block import Block, ends
from lyapcuda.solvers.ritz import Goal, rayleigh_ritz

__all__ = ["lobpcg", "sizes"]

# Vectors of each end that X holds besides.
_GUARDS = 1


def sizes(which: str, k: int, n: int) -> tuple[int, int]:
    """Vectors that a block starts with, and rows of its basis."""
    k = sum(end + _GUARDS for end in ends(which, k) if end)
    return min(k, n), min(3 * k, n, MAX_ROWS)


def lobpcg(
    product: Product,
    basis: Basis,
    goal: Goal,
    *,
    maxiter: int,
    generators: Sequence[torch.Generator],
    report: Report,
) -> Solution:
    """LOBPCG with an orthonormal basis [X, P, W]: memory for 3k + 3 vectors and their products.

    X holds a vector more than is wanted. With ``which="LM"`` it follows k values of each end (so
    twice the memory), until it is known which of them can't be among the wanted.

    Arguments as for `lanczos`; ``basis`` is of the `sizes`, its first rows hold start vectors.
    Every iteration costs a product for each value that hasn't converged.
    """
    n, room = basis.layout.numel, len(basis)
    block = Block(goal, guards=_GUARDS)
    k = sizes(goal.which, goal.k, n)[0]  # vectors of X
    products = Basis.empty(basis.layout, len(basis))
    device = basis.panels[0].device
    if any(basis.orthogonalise_(i)[-1] <= 0 for i in range(k)):
        raise FloatingPointError("g(θ) isn't finite, or the random start vectors are zero")
    size, done_to, history = k, 0, []
    for iteration in range(1, maxiter + 1):
        for i in range(done_to, size):
            product(basis.row(i), products.row(i))
        rows = slice(0, size)
        pairs = ((basis, basis), (basis, products), (products, products))
        grams = on_host(torch.stack([a[rows].gram(b[rows]) for a, b in pairs]))
        # X and P are combinations of combinations: what rounding has made of their orthonormality
        # by now is measured and divided out, so it doesn't add up.
        upright = np.linalg.inv(np.linalg.cholesky(grams[0])).T
        ritz = rayleigh_ritz(*(upright.T @ gram @ upright for gram in grams[1:]))
        verdict = block.judge(ritz)
        history.append((verdict.values, verdict.residuals))
        report(verdict)
        if bool(verdict.done.all()) or size == n or iteration == maxiter:
            break
        # X: the Ritz vectors that matter. P: what of them isn't in the old X, orthonormal to X.
        x = ritz.vectors[:, block.members]
        directions = x[:, np.argsort(~block.active, kind="stable")]
        directions[:k] = 0.0
        most = n - x.shape[1] if room == n else (room - x.shape[1]) // 2
        p = _orthonormal(directions, x)[:, :most] if size > k else np.zeros((size, 0))
        small = torch.as_tensor(upright @ np.concatenate([x, p], 1), device=device)
        k, kept = x.shape[1], small.shape[1]
        for panel in (basis, products):
            panel[:kept].combine_(panel[rows], small)
        # W: the residuals HX − Xθ of those that haven't converged; X itself goes with the basis.
        active = np.flatnonzero(block.active).tolist()[: room - kept]
        left = []
        for number, i in enumerate(active):
            row = kept + number
            for target, source in zip(basis.panels, products.panels, strict=True):
                target[row].copy_(source[i])
            left.append(basis.orthogonalise_(row)[-2:])
        size = kept
        for number, (before, after) in enumerate(left):
            # A residual that the others already span: a random direction serves as well.
            if after <= 0.25 * before:
                basis.randomise_(kept + number, generators)
                if not basis.orthogonalise_(kept + number)[-1] > 0:
                    break
            size += 1
        done_to = kept
    chosen = torch.as_tensor(upright @ ritz.vectors[:, verdict.indices], device=device)
    basis[: goal.k].combine_(basis[:size], chosen)
    basis[goal.k :].release()
    return Solution(verdict, basis[: goal.k], iteration, history)


def _orthonormal(columns: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """An orthonormal basis of what ``columns`` span outside of ``beside`` (orthonormal)."""
    found: list[np.ndarray] = []
    for column in columns.T:
        norm = np.linalg.norm(column)
        for _ in range(2):
            column = column - beside @ (beside.T @ column)
            for other in found:
                column = column - other * (other @ column)
        if np.linalg.norm(column) > 1e-8 * max(norm, 1e-300):
            found.append(column / np.linalg.norm(column))
    return np.stack(found, 1) if found else np.zeros((len(columns), 0))
