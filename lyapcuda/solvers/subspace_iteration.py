"""Benettin subspace iteration at a frozen θ (paper, App. C), with Chebyshev rates.

It uses the ops of the trackers, over products instead of gradients: D = Q + βHQ, Q orthonormal. At
a frozen θ the rates β may change from step to step. Those of Chebyshev's polynomials damp all that
lies between the unwanted end and the last vector's value, so that convergence goes with the square
root of the gaps, where a single rate goes with the gaps themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lyapcuda import ops
from lyapcuda.basis import Basis
from lyapcuda.solvers.convergence import BlockCriterion, ConvergenceStatus, Criterion, ends
from lyapcuda.solvers.ritz import order, rayleigh_ritz
from lyapcuda.solvers.solution import Product, Report, Solution, on_host

__all__ = ["MAX_BLOCK", "block_size", "merged", "one_end", "subspace_iteration"]

#: Vectors of a block, at most.
MAX_BLOCK = ops.MAX_K

# Vectors beside the wanted ones.
_GUARDS = 2
# What has less than this of its squared norm outside of other vectors is one of them.
_SAME = 0.01
# Nodes are at least so far from zero, relative to ‖H‖.
_FLAT = 1e-4


def one_end(
    product: Product,
    basis: Basis,
    criterion: Criterion,
    *,
    maxiter: int,
    report: Report,
    least: float = 0.0,
) -> Solution:
    """Iterates for the upper (``which="LA"``) or the lower end ("SA"), a product a vector.

    Arguments as for `lyapcuda.solvers.lanczos.lanczos`; ``basis`` has k rows or more, all of them
    start vectors: more show where the next values lie, without which no error can be estimated.
    Values that can't reach a magnitude of ``least`` count as done.
    """
    k, layout, block = len(basis), basis.layout, BlockCriterion(criterion, least)
    sign = {"LA": 1, "SA": -1}[criterion.which]
    for i in range(k):
        basis.orthogonalise_(i)
    moved = Basis.empty(layout, k)
    # What the ops call the gradient at θ: products are differences already.
    origin = [panel.new_zeros(panel.shape[1]) for panel in basis.panels]
    device = layout.device
    state = ops.new_state(device, k, perturbation=1.0, beta=0.0)
    names = ("beta", "transform", "again", "pending")
    beta, transform, again, pending = (ops.state_field(state, k, name) for name in names)
    finite = torch.zeros(1, dtype=torch.float64, device=device)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for iteration in range(1, maxiter + 1):
        for i in range(k):
            product(basis.row(i), moved.row(i))
        if iteration == 1:
            norm = _largest(on_host(moved.gram(moved)))
            beta.fill_(1.0 / norm if norm > 0 else 0.0)
        gram = torch.zeros(2 * k, 2 * k, dtype=torch.float64, device=device)
        for q, d, zero in zip(basis.panels, moved.panels, origin, strict=True):
            part = ops.ascent_(d, q, [zero], d, [0], state.to(q.device), sign=sign)
            gram += part.to(device)
        host = on_host(gram)
        block.scale = max(block.scale, _largest(host[k:, k:]))
        ritz = rayleigh_ritz(host[:k, k:], host[k:, k:])
        status = block.judge(ritz)
        history.append((status.values, status.residuals))
        report(status)
        if bool(status.done.all()) or iteration == maxiter:
            break
        ops.benettin_(state, gram, finite, k, sign=sign, control=False, alternate=False)
        for d in moved.panels:
            ops.combine_(d, d, transform.to(d.device), gate=again.to(d.device))
        second = [ops.gram(d, d, gate=again.to(d.device)).to(device) for d in moved.panels]
        ops.benettin_refine_(state, torch.stack(second).sum(0), k)
        for q, d in zip(basis.panels, moved.panels, strict=True):
            ops.combine_(q, d, transform.to(q.device), gate=pending.to(q.device))
        if k == 1:
            transform.fill_(1.0)  # it is in q now
        beta.fill_(_rate(iteration, block.scale, sign * ritz.values))
    vectors = Basis.empty(layout, criterion.k)
    chosen = torch.as_tensor(ritz.vectors[:, status.indices].copy(), device=device)
    vectors.combine_(basis, chosen)
    return Solution(status, vectors, iteration, history)


def block_size(k: int, n: int) -> int:
    """How many vectors are iterated for k values."""
    return min(k + _GUARDS, n, MAX_BLOCK)


def subspace_iteration(
    product: Product, basis: Basis, criterion: Criterion, *, maxiter: int, report: Report
) -> Solution:
    """Iterates for one end, or for both, one after the other: arguments as for `one_end`."""
    parts: list[Solution] = []
    least = 0.0
    for which, k in zip(("LA", "SA"), ends(criterion.which, criterion.k), strict=True):
        if not k:
            continue
        rows = block_size(k, basis.layout.numel)
        start = Basis(basis.layout, [panel[:rows].clone() for panel in basis.panels])
        part = replace(criterion, which=which, k=k)
        parts.append(one_end(product, start, part, maxiter=maxiter, report=report, least=least))
        if criterion.which == "LM":
            least = float(np.abs(parts[0].status.values).min())
    return parts[0] if len(parts) == 1 else merged(parts, criterion)


def _rate(i: int, scale: float, values: np.ndarray) -> float:
    """The i-th β: where 1 + βh is to be zero, −1/β, runs through Chebyshev's nodes of the interval
    from −``scale`` (‖H‖) to the least of ``values``, in an order that keeps any run of them even.
    """
    if scale == 0:
        return 0.0
    place, digit = 0.0, 0.5
    while i:
        i, odd = divmod(i, 2)
        place, digit = place + digit * odd, digit / 2
    half = (max(float(values.min()), -scale) + scale) / 2
    node = half - scale + half * math.cos(math.pi * place)
    # Zero is one of them: an infinite rate, so that it's H alone that turns the copies.
    return -1.0 / node if abs(node) > _FLAT * scale else 1.0 / (_FLAT * scale)


def _largest(square: np.ndarray) -> float:
    return math.sqrt(max(float(np.linalg.eigvalsh(square)[-1]), 0.0))


def _apart(high: Basis, low: Basis) -> np.ndarray:
    """Makes the rows of ``low`` orthogonal to those of ``high`` and to each other.

    Returns:
        What is left of each row's squared norm.
    """
    rows = Basis.empty(low.layout, len(high) + len(low))
    for panel, first, second in zip(rows.panels, high.panels, low.panels, strict=True):
        panel[: len(high)].copy_(first)
        panel[len(high) :].copy_(second)
    left = np.array([rows.orthogonalise_(len(high) + i)[-1] for i in range(len(low))])
    for panel, second in zip(rows.panels, low.panels, strict=True):
        second.copy_(panel[len(high) :])
    return left


def merged(parts: Sequence[Solution], criterion: Criterion) -> Solution:
    """The wanted pairs of two solutions, one from each end of the spectrum."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.status, name) for part in parts])

    values = joined("values")
    if criterion.which == "LM":
        # In a small space both ends may have found the same vector.
        high, low = (part.vectors for part in parts)
        twice = np.concatenate([np.zeros(len(high)), (on_host(high.gram(low)) ** 2).sum(0)]) > 0.5
        by_size = order(values, "LM", criterion.k)
        wanted = by_size[~twice[by_size]][: criterion.k]
    else:  # BE: all of them, descending
        wanted = np.argsort(-values, kind="stable")
        # Both climbs may have ended in one eigenspace: the low end takes another basis of it.
        left = _apart(*(part.vectors for part in parts))
        lost = np.concatenate([np.zeros(len(parts[0].vectors), dtype=bool), left < _SAME])
        for part, gone in zip(parts, np.split(lost, [len(parts[0].vectors)]), strict=True):
            part.status.done[gone] = part.status.converged[gone] = False
    names = ("values", "residuals", "bounds", "errors", "done", "converged")
    scale = max(part.status.scale for part in parts)
    status = ConvergenceStatus(wanted, *(joined(name)[wanted] for name in names), scale)
    if criterion.which == "LM":
        # What is still on its way may come to lie before one that was chosen.
        way = np.setdiff1d(np.flatnonzero(~joined("done")), wanted)
        towards = np.repeat([1.0, -1.0], [len(part.status.values) for part in parts])
        most = (towards * values + joined("residuals"))[way].max(initial=0.0)
        passed = np.abs(status.values) * (1.0 + criterion.tol) < most
        status.done[passed], status.converged[passed] = False, False
    first = parts[0].vectors
    panels = [
        torch.cat(panels)[torch.as_tensor(wanted, device=panels[0].device)]
        for panels in zip(*(part.vectors.panels for part in parts), strict=True)
    ]
    history = [entry for part in parts for entry in part.history]
    return Solution(
        status, Basis(first.layout, panels), sum(part.iterations for part in parts), history
    )
