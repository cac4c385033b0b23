"""Ritz values of a projected Hessian: which are wanted, and how far off they are.

Everything here is NumPy in float64 on the host, of the size of a basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["WHICH", "Ritz", "error_bounds", "order", "rayleigh_ritz", "spacing"]

#: Which eigenvalues: largest, smallest (algebraic), largest magnitude, both ends.
WHICH = ("LA", "SA", "LM", "BE")

#: Neighbours that a cluster of values may have, at most.
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
