"""Which eigenvalues a block of vectors has found that was built for them alone.

A Krylov space shows the whole spectrum. A block that climbs shows its own end of it, and next to
nothing of what comes after: the others are taken to lie as near as their residuals let them be.
Where magnitude decides, both ends are climbed, each as far as to know which of its values can't
win.
"""

from __future__ import annotations

import numpy as np

from lyapcuda.solvers.ritz import Goal, Ritz, Verdict, error_bounds, order

__all__ = ["Block", "ends"]

# Residuals of so many times the differences' error are nothing but that, for a good part.
_NOISE = 5.0
# An end can't win by magnitude where it lies so many residuals short of it, after so many steps.
_REACH = 10.0
_GROWN = 8


def ends(which: str, k: int) -> tuple[int, int]:
    """How many values of the upper and of the lower end are to be followed."""
    half = k - k // 2
    return {"LA": (k, 0), "SA": (0, k), "LM": (k, k), "BE": (half, k // 2)}[which]


class Block:
    """What a block is after.

    Attributes:
        high, low: how many values of each end may still be among the wanted.
        least: with "LM" a magnitude that the wanted values have; otherwise what they need to have
            to be of interest (0: all are).
        guards: vectors of each end besides: an eigenvalue that lies close to a wanted one, and that
            the block has hardly a part of yet, comes between them.
        scale: a lower bound of ‖H‖.
        members: Ritz values to keep vectors of, the upper end first.
        active: which of the members a further step should improve.
    """

    def __init__(self, goal: Goal, least: float = 0.0, guards: int = 0) -> None:
        self.goal, self.least, self.guards, self.scale = goal, least, guards, 0.0
        self.judged = 0
        self.high, self.low = (k + guards if k else 0 for k in ends(goal.which, goal.k))
        self.members, self.active = np.zeros(0, dtype=int), np.zeros(0, dtype=bool)

    def judge(self, ritz: Ritz) -> Verdict:
        """The wanted pairs; sets ``members`` and ``active``."""
        goal, m, values = self.goal, len(ritz.values), ritz.values
        size = np.abs(values)
        self.scale = max(self.scale, size.max())
        errors = goal.errors(ritz, self.scale)
        top = np.arange(m)[::-1][: self.high]
        bottom = np.arange(min(self.low, m - len(top)))
        both = np.concatenate([top, bottom])
        wanted = both[order(values[both], goal.which, goal.k)[: goal.k]]
        bounds = ritz.outside.copy()
        for end, towards in ((top, 1.0), (bottom, -1.0)):
            for part in (end, np.intersect1d(end, wanted)):
                bounds[part] = self._bounds(ritz, part, towards)[part]
        done = goal.settled(ritz, bounds, errors, noise=_NOISE)
        # How large each may still turn out to be. Residuals tell of an eigenvalue, not of which
        # one; those of random vectors, small in a large space, hardly of any.
        self.judged += 1
        times = 1.0 if m == goal.size else _REACH if self.judged >= _GROWN else np.inf
        most = np.zeros(m)
        for end, towards in ((top, 1.0), (bottom, -1.0)):
            unsettled = ritz.outside[end][~done[end]]
            reach = times * unsettled.max() if len(unsettled) else 0.0
            most[end] = towards * values[end] + np.where(done[end], 0.0, reach)
        rivals = wanted[:0]
        if goal.which == "LM":
            self.least = max(self.least, size[wanted].min())
        matters = most > (1.0 + goal.tol) * self.least
        if goal.which == "LM":
            rivals = np.setdiff1d(both[matters[both]], wanted)
        elif self.least > 0:
            done |= ~matters
        needed = np.isin(np.arange(m), np.concatenate([wanted, rivals]))
        # What comes after the last that is needed of an end can't win any more.
        for end in (top, bottom):
            last = np.flatnonzero(needed[end]).max(initial=-1)
            if last >= 0:
                needed[end[: last + 1 + self.guards]] = True
        top, bottom = (end[: np.count_nonzero(needed[end])] for end in (top, bottom))
        self.high, self.low = len(top), len(bottom)
        self.members = np.concatenate([top, bottom])
        self.active = (needed & ~done)[self.members]
        passed = size * (1.0 + goal.tol) < most[rivals].max(initial=0.0)
        return goal.verdict(ritz, wanted, bounds, errors, done & ~passed)

    def _bounds(self, ritz: Ritz, end: np.ndarray, towards: float) -> np.ndarray:
        """Error bounds for the values of one end."""
        others = np.setdiff1d(np.arange(len(ritz.values)), end)
        if not len(end) or len(ritz.values) == self.goal.size:
            return error_bounds(ritz.values, ritz.outside)
        if not len(others):
            return ritz.outside
        values = towards * ritz.values
        # Past the nearest of the end a gap can't be told from a crossing: r alone is left.
        moved = values[others] + ritz.outside[others]
        values[others] = np.minimum(moved, values[end].min())
        up = np.argsort(values, kind="stable")
        bounds = np.empty_like(values)
        bounds[up] = error_bounds(values[up], ritz.outside[up])
        return bounds
