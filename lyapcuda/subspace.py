"""Subspace iteration: k copies that climb side by side at a frozen θ (Benettin, paper App. C).

The ops of the trackers, over products instead of gradients: separations of norm 1, whose copies
part as D = Q + βHQ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lyapcuda import panel_ops
from lyapcuda.basis import Basis, Product, Report, Solution, on_host
from lyapcuda.ritz import Goal, Verdict, order, rayleigh_ritz

__all__ = ["MAX_COPIES", "merged", "subspace"]

#: How many copies the ops take.
MAX_COPIES = 32


def subspace(
    product: Product, basis: Basis, goal: Goal, *, maxiter: int, report: Report
) -> Solution:
    """Ascent (``which="LA"``) or descent ("SA") of k copies, a product each an iteration.

    Arguments as for `lyapcuda.lanczos.lanczos`; ``basis`` has k rows or more, all of them start
    vectors: more show where the next values lie, without which no error can be estimated.
    """
    k, layout = len(basis), basis.layout
    sign = {"LA": 1, "SA": -1}[goal.which]
    for i in range(k):
        basis.orthogonalise_(i)
    moved = Basis.empty(layout, k)
    # What the ops call the gradient at θ and θ itself: products are differences already.
    origin = [panel.new_zeros(panel.shape[1]) for panel in basis.panels]
    device = layout.device
    state = panel_ops.new_panel_state(device, k, perturbation=1.0, beta=0.0)
    beta, transform, again, pending = (
        panel_ops.panel_field(state, k, name) for name in ("beta", "transform", "again", "pending")
    )
    norm = 0.0  # a lower bound of ‖H‖
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
            part = panel_ops.panel_ascent_(d, q, [zero], d, [0], state.to(q.device), sign=sign)
            gram += part.to(device)
        host = on_host(gram)
        ritz = rayleigh_ritz(host[:k, k:], host[k:, k:])
        verdict = goal.judge(ritz, block=True)
        history.append((verdict.values, verdict.residuals))
        report(verdict)
        if bool(verdict.done.all()) or iteration == maxiter:
            break
        panel_ops.benettin_(state, gram, finite, k, sign=sign, control=False, alternate=False)
        for d in moved.panels:
            panel_ops.combine_(d, d, transform.to(d.device), gate=again.to(d.device))
        second = [panel_ops.gram(d, d, gate=again.to(d.device)).to(device) for d in moved.panels]
        panel_ops.benettin_refine_(state, torch.stack(second).sum(0), k)
        for q, d, zero in zip(basis.panels, moved.panels, origin, strict=True):
            panel_ops.panel_recenter_(q, d, d, [zero], [0], state.to(q.device))
        pending.zero_()
        # 1/‖H‖ makes the unwanted end the slowest. As fast as Algorithm 1, (e − 1)/‖H‖, is safe
        # where what is wanted grows.
        norm = max(norm, _largest(host[k:, k:]))
        grows = bool((sign * verdict.values > 0).all())
        beta.fill_(0.0 if norm == 0 else (math.e - 1.0 if grows else 1.0) / norm)
    vectors = Basis.empty(layout, goal.k)
    chosen = torch.as_tensor(ritz.vectors[:, verdict.indices].copy(), device=device)
    vectors.combine_(basis, chosen)
    return Solution(verdict, vectors, iteration, history)


def _largest(square: np.ndarray) -> float:
    return math.sqrt(max(float(np.linalg.eigvalsh(square)[-1]), 0.0))


def merged(parts: Sequence[Solution], goal: Goal) -> Solution:
    """The wanted pairs of two solutions, one from each end of the spectrum."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.verdict, name) for part in parts])

    values = joined("values")
    if goal.which == "LM":
        # In a small space both ends may have found the same vector.
        high, low = (part.vectors for part in parts)
        twice = np.concatenate([np.zeros(len(high)), (on_host(high.gram(low)) ** 2).sum(0)]) > 0.5
        wanted = [i for i in order(values, "LM", goal.k).tolist() if not twice[i]][: goal.k]
    else:  # BE: all of them, descending
        wanted = np.argsort(-values, kind="stable")
    names = ("values", "residuals", "errors", "done", "converged")
    verdict = Verdict(wanted, *(joined(name)[wanted] for name in names))
    first = parts[0].vectors
    panels = [
        torch.cat(panels)[torch.as_tensor(wanted, device=panels[0].device)]
        for panels in zip(*(part.vectors.panels for part in parts), strict=True)
    ]
    history = [entry for part in parts for entry in part.history]
    return Solution(
        verdict, Basis(first.layout, panels), sum(part.iterations for part in parts), history
    )
