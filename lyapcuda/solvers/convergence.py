"""When an eigenvalue counts as converged: one criterion, and its test for block methods.

Every threshold of the solvers is here. An eigenvalue ρ with residual r is *done*, the solver has
nothing more to do for it, where all of these hold; it has *converged* where the finite differences
are good for the tolerance as well.

=====================  =========================================================================
what                   threshold
=====================  =========================================================================
estimated error        min(r, R²/gap) ≤ `SOLVER_SHARE` · tol · |ρ|
rigorous bound         r ≤ `RIGOROUS` · tol · |ρ|; where values are crowded,
                       `CROWDED_SHARE` · tol · |ρ| or 1/`CROWDED` of their spacing
order                  no other Ritz value may still turn out to come before it
missed eigenvalues     none between the values found, as far as the start vector can tell
                       (`UNLUCKY`; `lyapcuda.solvers.missed`)
differences            estimated error + `ERROR_FACTOR` · error of the differences ≤ tol · |ρ|
zero                   or |ρ| ≤ `ZERO` · error of the differences, which can't tell it from zero,
                       where so much is within `ZERO_SHARE` · tol · ‖H‖
=====================  =========================================================================

Everything here is NumPy in float64 on the host, of the size of a basis.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from lyapcuda.objective.loss_graph import COARSE
from lyapcuda.solvers.missed import KrylovGrowth
from lyapcuda.solvers.ritz import Ritz, error_bounds, order, spacing

__all__ = ["BlockCriterion", "ConvergenceStatus", "Criterion", "ends"]

# Of the tolerance, what the solver's own error may take at most; the differences' has the rest.
SOLVER_SHARE = 0.5
# How far the estimate of that may fall short (at most 1.7-fold, once in a thousand values of the
# tests' nets).
ERROR_FACTOR = 1.5
# Less than so much of the differences' error isn't worth a product.
NEGLIGIBLE = 0.2
# The rigorous bound, the residual r, has to be within so many times the tolerance as well, less
# where values lie close together: an eigenvalue that hides beside a found one at a distance of a
# few r shows in nothing but r, and there is one with a chance of about r / (distance of values).
RIGOROUS = 5.0
CROWDED_SHARE = 0.5
CROWDED = 50.0
# An overlooked eigenvalue's part in the start vector isn't taken to be less than this share of what
# is usual in a random vector.
UNLUCKY = 0.1
# Values of at most this many times the differences' error count as zero,
ZERO = 3.0
# where so much is small beside ‖H‖: of tol · ‖H‖ at most this share.
ZERO_SHARE = 0.1
# Residuals of so many times the differences' error are nothing but that, for a good part.
BLOCK_NOISE = 5.0
# An end can't win by magnitude where it lies so many residuals short of it, after so many steps.
BLOCK_REACH = 10.0
BLOCK_STEPS = 8
# Of a Krylov space: less than this, relative to H, is what is left of a product when the basis
# spans an invariant subspace: rounding, amplified by each product since.
INVARIANT = 1e-3
# From so many products on, what has grown from a random vector shows its extreme values.
KRYLOV_STEPS = 6
# Relative error of an eigenvalue that differences have on smooth losses, c·ε^power of the
# parameters' dtype: at most so much on the nets of the tests.
DIFFERENCE_ACCURACY = {"forward": (1.5, 1 / 2), "central": (5.0, 2 / 3)}
# That of exact products, in ε of 16-bit types and TF32.
EXACT_ACCURACY = 2.0
# Forward differences do for tolerances of at least so many times their accuracy.
FORWARD_MARGIN = 1.9


def accuracy_of(kind: str, epsilon: float, dtype: torch.dtype) -> float:
    """Relative error of an eigenvalue that products have on a smooth loss.

    Args:
        kind: "exact", or "forward" or "central" differences.
        epsilon: machine epsilon of what the loss is computed in.
        dtype: of the vectors.
    """
    if kind == "exact":
        coarse = epsilon > COARSE
        return EXACT_ACCURACY * epsilon if coarse else torch.finfo(dtype).eps
    factor, power = DIFFERENCE_ACCURACY[kind]
    return factor * epsilon**power


def ends(which: str, k: int) -> tuple[int, int]:
    """How many values of the upper and of the lower end are to be followed."""
    half = k - k // 2
    return {"LA": (k, 0), "SA": (0, k), "LM": (k, k), "BE": (half, k // 2)}[which]


@dataclass
class ConvergenceStatus:
    """The wanted values, (k,) arrays in the order they are returned, and what they are worth.

    Attributes:
        indices: where they stand among the Ritz values.
        values, residuals: of them.
        bounds: how far the solver is estimated to be off.
        errors: estimated error of the differences.
        done: the solver has nothing more to do for it.
        converged: done, and the differences are good for the tolerance.
        scale: the largest magnitude of a Ritz value: a lower bound of ‖H‖.
    """

    indices: np.ndarray
    values: np.ndarray
    residuals: np.ndarray
    bounds: np.ndarray
    errors: np.ndarray
    done: np.ndarray
    converged: np.ndarray
    scale: float

    def hopeless(self, tol: float) -> bool:
        """Whether the differences aren't good enough for one of the values, done or not."""
        return bool((ERROR_FACTOR * self.errors > tol * np.abs(self.values)).any())

    @property
    def limited(self) -> bool:
        """Whether the differences aren't good enough for a value that is found."""
        return bool((self.done & ~self.converged).any())


@dataclass(frozen=True)
class Criterion:
    """What is asked for.

    Attributes:
        k, which: how many, and which.
        tol: relative error of each eigenvalue.
        accuracy: relative error that differences of this kind have on a smooth loss.
        rounding: of the buffers.
        size: of H.
    """

    k: int
    which: str
    tol: float
    accuracy: float
    rounding: float
    size: int

    def judge(self, ritz: Ritz, fresh: np.ndarray | None = None) -> ConvergenceStatus:
        """The wanted pairs of a Krylov basis (fewer than k while it is smaller).

        Args:
            fresh: (m,) which of them grew from a random vector put in just now.
        """
        m, size, errors = len(ritz.values), np.abs(ritz.values), self.errors(ritz)
        wanted = order(ritz.values, self.which, self.k)[: self.k]
        bounds = error_bounds(ritz.values, ritz.outside)
        crowded = np.maximum(CROWDED_SHARE * self.tol * size, spacing(ritz.values) / CROWDED)
        done = self.settled(ritz, bounds, errors, most=crowded)
        # How far the others may still move. What a random vector shows at first says little: it
        # holds each eigenvector with a weight of 1/n only.
        reach = np.where(done, 2.0 * bounds, ritz.outside)
        if fresh is not None and m < self.size:
            new = fresh & ~done
            reach[new] = np.sqrt(self.size) * ritz.outside[new]
        done[wanted] &= ~self._passed(ritz.values, wanted, reach)
        return self.status(ritz, wanted, bounds, errors, done)

    def errors(self, ritz: Ritz, scale: float = 0.0) -> np.ndarray:
        """(m,) estimated error of the differences; ``scale``: a lower bound of ‖H‖."""
        m, size = len(ritz.values), np.abs(ritz.values)
        # The asymmetry has m components, of which the eigenvalue sees one.
        errors = np.maximum(ritz.asymmetry * min(1.0, np.sqrt(8.0 / m)), self.accuracy * size)
        floor = max(4 * self.rounding, 0.1 * self.accuracy)
        return np.maximum(errors, floor * max(scale, size.max()))

    def settled(
        self,
        ritz: Ritz,
        bounds: np.ndarray,
        errors: np.ndarray,
        most: np.ndarray | float = np.inf,
        noise: float = 1.0,
    ) -> np.ndarray:
        """(m,) which values the solver need not improve: ``bounds`` leave the differences their
        part of the tolerance, or are far below their error.

        Args:
            most: what the residual has to be within, besides `RIGOROUS` tolerances.
            noise: of so many times the differences' error it needn't be less.
        """
        tolerance = self.tol * np.abs(ritz.values)
        share = np.minimum(SOLVER_SHARE * tolerance, tolerance - ERROR_FACTOR * errors)
        done = bounds <= np.maximum(share, NEGLIGIBLE * errors)
        # An estimate is fooled by a close pair that hasn't parted yet; the residual isn't.
        most = np.minimum(most, RIGOROUS * tolerance)
        done &= ritz.outside <= np.maximum(most, noise * errors)
        # No product makes noise less.
        done |= (ritz.outside <= noise * errors) & (bounds <= SOLVER_SHARE * tolerance)
        # Zero, as far as differences can tell.
        size = np.abs(ritz.values)
        return done | self.is_zero(size + ritz.outside, errors, size.max())

    def status(
        self,
        ritz: Ritz,
        wanted: np.ndarray,
        bounds: np.ndarray,
        errors: np.ndarray,
        done: np.ndarray,
    ) -> ConvergenceStatus:
        """Of the ``wanted`` ones: what is done has converged where both errors together are within
        the tolerance, or where it is zero.
        """
        good = self._good(ritz.values, bounds, errors, np.abs(ritz.values).max())
        parts = (ritz.values, ritz.residuals, bounds, errors, done, done & good)
        scale = float(np.abs(ritz.values).max())
        return ConvergenceStatus(wanted, *(part[wanted] for part in parts), scale)

    def coarser(
        self, status: ConvergenceStatus, error: float, least: float = 0.0
    ) -> ConvergenceStatus:
        """The status, where products have turned out to be off by so much of each value, and by
        ``least``.
        """
        errors = np.maximum(status.errors, error * np.abs(status.values))
        errors = np.maximum(errors, least)
        good = self._good(status.values, status.bounds, errors, status.scale)
        return replace(status, errors=errors, converged=status.converged & good)

    def _good(
        self, values: np.ndarray, bounds: np.ndarray, errors: np.ndarray, scale: float
    ) -> np.ndarray:
        size = np.abs(values)
        within = bounds + ERROR_FACTOR * errors <= self.tol * size
        return within | self.is_zero(size, errors, scale)

    def is_zero(self, size: np.ndarray, errors: np.ndarray, scale: float) -> np.ndarray:
        """Whether the differences can't tell values of this size from zero, though their error is
        small beside ‖H‖ (``scale``).
        """
        small = ZERO * errors <= ZERO_SHARE * self.tol * scale
        return small & (size <= ZERO * errors)

    def without_hidden(
        self, status: ConvergenceStatus, values: np.ndarray, growth: KrylovGrowth
    ) -> ConvergenceStatus:
        """The status, less what an eigenvalue overlooked so far would displace.

        Looked at are the intervals between neighbours among the wanted values, and beyond the
        outermost; for LM those of either sign down to the least magnitude. There is no other Ritz
        value in them, and between two of those ‖w‖ has a single hump: their ends are enough.
        """
        margin = self.tol * np.abs(values)
        # Of the start vector, half of which is random.
        least = UNLUCKY / np.sqrt(2.0 * self.size)
        size, done = np.abs(status.values), status.done.copy()
        smallest = status.indices[size.argmin()]
        for side, towards in (
            (self._side(status, up=True), 1.0),
            (self._side(status, False), -1.0),
        ):
            chosen = np.array(sorted(side, key=lambda i: -towards * values[i]), dtype=int)
            near = [values[i] + towards * margin[i] for i in chosen]
            if self.which == "LM" and smallest not in chosen:
                near.append(towards * (size.min() + margin[smallest]))
            for place, end in enumerate(near):
                ends, outer = [end], np.inf
                if place:
                    last = chosen[place - 1]
                    outer = np.abs(values[last])
                    ends.append(values[last] - towards * margin[last])
                    if towards * (ends[1] - ends[0]) <= 0:
                        continue
                if (growth.of(np.array(ends)) * least >= 1.0).all():
                    continue
                if self.which == "LM":
                    done &= size > outer
                else:
                    done &= ~np.isin(status.indices, chosen[place:])
                break
        return replace(status, done=done, converged=status.converged & done)

    def _side(self, status: ConvergenceStatus, up: bool) -> np.ndarray:
        """Indices of the wanted values that are counted from the upper (lower) end."""
        if self.which in ("LA", "SA"):
            return status.indices if up == (self.which == "LA") else status.indices[:0]
        if self.which == "LM":
            return status.indices[(status.values > 0) == up]
        half = self.k - self.k // 2
        return status.indices[:half] if up else status.indices[half:]

    def bound(self, status: ConvergenceStatus) -> float:
        """What the residual of each wanted value has to be within, at the least."""
        return RIGOROUS * self.tol * float(np.abs(status.values).min())

    def repeats(self, status: ConvergenceStatus) -> bool:
        """Whether two of the wanted values are the same within the tolerance."""
        values = np.sort(status.values)
        slack = self.tol * np.abs(values) + 2.0 * status.errors.max(initial=0.0)
        return bool((np.diff(values) <= slack[1:]).any())

    def may_repeat_zero(self, status: ConvergenceStatus) -> bool:
        """Whether further copies of a value that seems to be zero would displace wanted ones."""
        zero = status.indices[np.abs(status.values) <= ZERO * status.errors]
        sides = (self._side(status, up=True), self._side(status, up=False))
        if self.which == "LM":
            sides = (status.indices,)
        # `BE` lists the low end from the inside outwards.
        inmost = [
            side[0 if self.which == "BE" and i else -1] for i, side in enumerate(sides) if len(side)
        ]
        return bool(len(np.setdiff1d(zero, inmost)))

    def _passed(self, values: np.ndarray, wanted: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """For each wanted value whether another one may still turn out to come before it."""
        others = np.setdiff1d(np.arange(len(values)), wanted)
        chosen = values[wanted]
        slack = self.tol * np.abs(chosen)
        if not len(others):
            return np.zeros(len(wanted), dtype=bool)
        highest = (values[others] + reach[others]).max()
        lowest = (values[others] - reach[others]).min()
        above, below = highest > chosen + slack, lowest < chosen - slack
        if self.which == "LA":
            return above
        if self.which == "SA":
            return below
        if self.which == "LM":
            return max(highest, -lowest) > np.abs(chosen) + slack
        high = np.arange(len(wanted)) < self.k - self.k // 2
        return np.where(high, above, below)


class BlockCriterion:
    """The criterion for a block of vectors that was built for the wanted values alone.

    A Krylov space shows the whole spectrum. Such a block shows its own end of it, and next to
    nothing of what comes after: the others are taken to lie as near as their residuals let them be.
    Where magnitude decides, both ends are followed, each until it is known which of its values
    can't be among the wanted.

    Attributes:
        high, low: how many values of each end may still be among the wanted.
        least: with "LM" a magnitude that the wanted values have; otherwise what they need to have
            to be of interest (0: all are).
        scale: a lower bound of ‖H‖.
        members: Ritz values to keep vectors of, the upper end first.
        active: which of the members a further step should improve.
    """

    def __init__(self, criterion: Criterion, least: float = 0.0) -> None:
        self.criterion, self.least, self.scale = criterion, least, 0.0
        self.judged = 0
        self.high, self.low = ends(criterion.which, criterion.k)
        self.members, self.active = np.zeros(0, dtype=int), np.zeros(0, dtype=bool)

    def judge(self, ritz: Ritz) -> ConvergenceStatus:
        """The wanted pairs; sets ``members`` and ``active``."""
        criterion, m, values = self.criterion, len(ritz.values), ritz.values
        size = np.abs(values)
        self.scale = max(self.scale, size.max())
        errors = criterion.errors(ritz, self.scale)
        top = np.arange(m)[::-1][: self.high]
        bottom = np.arange(min(self.low, m - len(top)))
        both = np.concatenate([top, bottom])
        wanted = both[order(values[both], criterion.which, criterion.k)[: criterion.k]]
        bounds = ritz.outside.copy()
        for end, towards in ((top, 1.0), (bottom, -1.0)):
            for part in (end, np.intersect1d(end, wanted)):
                bounds[part] = self._bounds(ritz, part, towards)[part]
        done = criterion.settled(ritz, bounds, errors, noise=BLOCK_NOISE)
        # How large each may still turn out to be. Residuals tell of an eigenvalue, not of which
        # one; those of random vectors, small in a large space, hardly of any.
        self.judged += 1
        times = (
            1.0 if m == criterion.size else BLOCK_REACH if self.judged >= BLOCK_STEPS else np.inf
        )
        most = np.zeros(m)
        for end, towards in ((top, 1.0), (bottom, -1.0)):
            unsettled = ritz.outside[end][~done[end]]
            reach = times * unsettled.max() if len(unsettled) else 0.0
            most[end] = towards * values[end] + np.where(done[end], 0.0, reach)
        rivals = wanted[:0]
        if criterion.which == "LM":
            self.least = max(self.least, size[wanted].min())
        matters = most > (1.0 + criterion.tol) * self.least
        if criterion.which == "LM":
            rivals = np.setdiff1d(both[matters[both]], wanted)
        elif self.least > 0:
            done |= ~matters
        needed = np.isin(np.arange(m), np.concatenate([wanted, rivals]))
        # What comes after the last that is needed of an end can't win any more.
        for end in (top, bottom):
            last = np.flatnonzero(needed[end]).max(initial=-1)
            if last >= 0:
                needed[end[: last + 1]] = True
        top, bottom = (end[: np.count_nonzero(needed[end])] for end in (top, bottom))
        self.high, self.low = len(top), len(bottom)
        self.members = np.concatenate([top, bottom])
        self.active = (needed & ~done)[self.members]
        passed = size * (1.0 + criterion.tol) < most[rivals].max(initial=0.0)
        return criterion.status(ritz, wanted, bounds, errors, done & ~passed)

    def _bounds(self, ritz: Ritz, end: np.ndarray, towards: float) -> np.ndarray:
        """Error bounds for the values of one end."""
        others = np.setdiff1d(np.arange(len(ritz.values)), end)
        if not len(end) or len(ritz.values) == self.criterion.size:
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
