"""Small eigenproblems of a projected Hessian: which values are wanted, and how far off they are.

Everything here is NumPy in float64 on the host, of the size of a basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lyapcuda.solvers.missed import Growth

__all__ = ["WHICH", "Goal", "Ritz", "Verdict", "error_bounds", "order", "rayleigh_ritz"]

#: Which eigenvalues: largest, smallest (algebraic), largest magnitude, both ends.
WHICH = ("LA", "SA", "LM", "BE")

# Of the tolerance, what the solver's own error may take at most; the differences' has the rest.
_SHARE = 0.5
# How far the estimate of that may fall short (at most 1.7-fold, once in a thousand values of the
# tests' nets).
_DOUBT = 1.5
# Less than so much of the differences' error isn't worth a product.
_NEGLIGIBLE = 0.2
# The rigorous bound, the residual r, has to be within so many times the tolerance as well, less
# where values lie close together: an eigenvalue that hides beside a found one at a distance of a
# few r shows in nothing but r, and there is one with a chance of about r / (distance of values).
_RIGOROUS = 5.0
_STRICT = 0.5
_CROWDED = 50.0
# An overlooked eigenvalue's part in the start vector isn't taken to be less than this share of what
# is usual in a random vector, or than this share of what the found ones have.
_UNLUCKY = 0.01
_SHY = 0.006
# Nor is one looked for closer to a found one than this fraction of their usual distance.
_REPELLED = 10.0
# Values of at most this many times the differences' error count as zero.
_ZERO = 3.0
_CLUSTER = 8


@dataclass
class Ritz:
    """Approximate eigenpairs out of a basis, all of them.

    Attributes:
        values: (m,) ascending.
        vectors: (m, m), columns in the basis.
        outside: (m,) the part of Hu − ρu that is outside of the basis.
        asymmetry: (m,) the part that lies in it. A symmetric H has none: errors of the differences.
    """

    values: np.ndarray
    vectors: np.ndarray
    outside: np.ndarray
    asymmetry: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """(m,) ‖Hu − ρu‖ of the map that was measured."""
        return np.hypot(self.outside, self.asymmetry)


def rayleigh_ritz(whole: np.ndarray, square: np.ndarray) -> Ritz:
    """From S·(HS)ᵀ and HS·(HS)ᵀ, S orthonormal."""
    symmetric = (whole + whole.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    inside = np.linalg.norm(whole @ vectors, axis=0) ** 2
    outside = np.maximum(np.einsum("ij,ij->j", vectors, square @ vectors) - inside, 0.0)
    asymmetry = np.linalg.norm((whole - symmetric) @ vectors, axis=0)
    return Ritz(values, vectors, np.sqrt(outside), asymmetry)


def order(values: np.ndarray, which: str, k: int) -> np.ndarray:
    """Indices of ``values``, the wanted k first and in the order they are returned.

    LA and BE descend, SA ascends, LM goes by magnitude. BE takes one more of the high end where k
    is odd.
    """
    up = np.argsort(values, kind="stable")
    if which == "SA":
        return up
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    down = up[::-1]
    if which == "LA":
        return down
    k = min(k, len(values))
    wanted = np.concatenate([down[: k - k // 2], up[: k // 2][::-1]])
    alternately = np.stack([down, up], 1).ravel()
    rest = [i for i in dict.fromkeys(alternately.tolist()) if i not in set(wanted.tolist())]
    return np.concatenate([wanted, np.array(rest, dtype=int)])


def error_bounds(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """How far each Ritz value is off: the smaller of r and R²/gap.

    The quadratic bound (Kato–Temple) of a cluster of neighbours: R² is the sum of their squared
    residuals, the gap that to the next value outside. With true eigenvalues outside it would be
    rigorous. Here they are Ritz values, so it is an estimate, while r is rigorous.

    Args:
        values: (m,) ascending.
        residuals: (m,).
    """
    # Plain numbers: of the size of a basis, they are faster than arrays.
    bounds, squares, m = residuals.tolist(), (residuals**2).tolist(), len(values)
    gaps = [math.inf, *np.diff(values).tolist(), math.inf]
    for i in range(m):
        low = high = i
        square = squares[i]
        while high - low < _CLUSTER:
            below, above = gaps[low], gaps[high + 1]
            gap = min(below, above)
            if not gap < math.inf:
                break
            if gap > 0:
                bounds[i] = min(bounds[i], square / gap)
            # The nearer neighbour joins the cluster.
            if below <= above:
                low -= 1
                square += squares[low]
            else:
                high += 1
                square += squares[high]
    return np.array(bounds)


def spacing(values: np.ndarray) -> np.ndarray:
    """The mean distance of neighbours around each of ``values`` (ascending), two to each side."""
    m = len(values)
    i = np.arange(m)
    low, high = np.maximum(i - 2, 0), np.minimum(i + 2, m - 1)
    return (values[high] - values[low]) / np.maximum(high - low, 1) if m > 1 else np.full(m, np.inf)


@dataclass
class Verdict:
    """The wanted values, (k,) arrays in the order they are returned, and what they are worth.

    Attributes:
        indices: where they stand among the Ritz values.
        values, residuals: of them.
        bounds: how far the solver is estimated to be off.
        errors: estimated error of the differences.
        done: the solver has nothing more to do for it.
        converged: done, and the differences are good for the tolerance.
    """

    indices: np.ndarray
    values: np.ndarray
    residuals: np.ndarray
    bounds: np.ndarray
    errors: np.ndarray
    done: np.ndarray
    converged: np.ndarray

    @property
    def limited(self) -> bool:
        """Whether the differences aren't good enough for a value that is found."""
        return bool((self.done & ~self.converged).any())


@dataclass(frozen=True)
class Goal:
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

    def judge(self, ritz: Ritz, fresh: np.ndarray | None = None) -> Verdict:
        """The wanted pairs of a Krylov basis (fewer than k while it is smaller).

        Args:
            fresh: (m,) which of them grew from a random vector put in just now.
        """
        m, size, errors = len(ritz.values), np.abs(ritz.values), self.errors(ritz)
        wanted = order(ritz.values, self.which, self.k)[: self.k]
        bounds = error_bounds(ritz.values, ritz.outside)
        crowded = np.maximum(_STRICT * self.tol * size, spacing(ritz.values) / _CROWDED)
        done = self.settled(ritz, bounds, errors, most=crowded)
        # How far the others may still move. What a random vector shows at first says little: it
        # holds each eigenvector with a weight of 1/n only.
        reach = np.where(done, 2.0 * bounds, ritz.outside)
        if fresh is not None and m < self.size:
            new = fresh & ~done
            reach[new] = np.sqrt(self.size) * ritz.outside[new]
        done[wanted] &= ~self._passed(ritz.values, wanted, reach)
        return self.verdict(ritz, wanted, bounds, errors, done)

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
            most: what the residual has to be within, besides `_RIGOROUS` tolerances.
            noise: of so many times the differences' error it needn't be less.
        """
        tolerance = self.tol * np.abs(ritz.values)
        share = np.minimum(_SHARE * tolerance, tolerance - _DOUBT * errors)
        done = bounds <= np.maximum(share, _NEGLIGIBLE * errors)
        # An estimate is fooled by a close pair that hasn't parted yet; the residual isn't.
        most = np.minimum(most, _RIGOROUS * tolerance)
        done &= ritz.outside <= np.maximum(most, noise * errors)
        # No product makes noise less.
        done |= (ritz.outside <= noise * errors) & (bounds <= _SHARE * tolerance)
        # Zero, as far as differences can tell.
        return done | (np.abs(ritz.values) + ritz.outside <= _ZERO * errors)

    def verdict(
        self,
        ritz: Ritz,
        wanted: np.ndarray,
        bounds: np.ndarray,
        errors: np.ndarray,
        done: np.ndarray,
    ) -> Verdict:
        """Of the ``wanted`` ones: what is done has converged where both errors together are within
        the tolerance, or where it is zero.
        """
        good = self._good(ritz.values, bounds, errors)
        parts = (ritz.values, ritz.residuals, bounds, errors, done, done & good)
        return Verdict(wanted, *(part[wanted] for part in parts))

    def coarser(self, verdict: Verdict, error: float) -> Verdict:
        """The verdict, where differences have turned out to be off by so much of each value."""
        errors = np.maximum(verdict.errors, error * np.abs(verdict.values))
        good = self._good(verdict.values, verdict.bounds, errors)
        return replace(verdict, errors=errors, converged=verdict.converged & good)

    def _good(self, values: np.ndarray, bounds: np.ndarray, errors: np.ndarray) -> np.ndarray:
        size = np.abs(values)
        within = bounds + _DOUBT * errors <= self.tol * size
        return within | self.is_zero(values, errors)

    @staticmethod
    def is_zero(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Whether the differences can't tell them from zero."""
        return np.abs(values) <= _ZERO * errors

    def without_hidden(self, verdict: Verdict, values: np.ndarray, growth: Growth) -> Verdict:
        """The verdict, less what an eigenvalue overlooked so far would displace.

        Looked at are the intervals between neighbours among the wanted values, and beyond the
        outermost; for LM those of either sign down to the least magnitude. There is no other Ritz
        value in them, and between two of those ‖w‖ has a single hump: their ends are enough.
        """
        margin = np.maximum(self.tol * np.abs(values), spacing(values) / _REPELLED)
        found = growth.of(values[verdict.indices])
        least = max(_UNLUCKY / np.sqrt(2.0 * self.size), _SHY / float(np.median(found)))
        size, done = np.abs(verdict.values), verdict.done.copy()
        smallest = verdict.indices[size.argmin()]
        for side, towards in (
            (self._side(verdict, up=True), 1.0),
            (self._side(verdict, False), -1.0),
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
                    done &= ~np.isin(verdict.indices, chosen[place:])
                break
        return replace(verdict, done=done, converged=verdict.converged & done)

    def _side(self, verdict: Verdict, up: bool) -> np.ndarray:
        """Indices of the wanted values that are counted from the upper (lower) end."""
        if self.which in ("LA", "SA"):
            return verdict.indices if up == (self.which == "LA") else verdict.indices[:0]
        if self.which == "LM":
            return verdict.indices[(verdict.values > 0) == up]
        half = self.k - self.k // 2
        return verdict.indices[:half] if up else verdict.indices[half:]

    def repeats(self, verdict: Verdict) -> bool:
        """Whether two of the wanted values are the same within the tolerance."""
        values = np.sort(verdict.values)
        slack = self.tol * np.abs(values) + 2.0 * verdict.errors.max(initial=0.0)
        return bool((np.diff(values) <= slack[1:]).any())

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
