"""What a Krylov space can't have overlooked: which eigenvalues are ruled out beside those found.

A Krylov method sees an eigenvector u (eigenvalue μ) as far as the start vector has a part in it.
From HV = VT + f·coupling follows, u taken from the left, how u's parts in the basis grow out of
that first one, a: they are a·w(μ), and w needs nothing but the projected matrix. The basis is
orthonormal, so |a|·‖w(μ)‖ ≤ 1 for every eigenvalue there is. Where ‖w(μ)‖ is large, there is none,
unless the start vector has hardly any part in it.
"""

from __future__ import annotations

import numpy as np

__all__ = ["KrylovGrowth"]

# From here on there is no question.
_ENOUGH = 1e100


class KrylovGrowth:
    """The steps of a Lanczos run, to be gone through again for any μ."""

    def __init__(self) -> None:
        self._steps: list[tuple[np.ndarray, float] | np.ndarray] = []

    def product(self, column: np.ndarray, coupling: float) -> None:
        """H times the last member: its part in each member, and that beside them."""
        self._steps.append((column.copy(), coupling))

    def restart(self, kept: np.ndarray) -> None:
        """The members became these combinations of them (columns); f stayed."""
        self._steps.append(kept.copy())

    def of(self, mu: np.ndarray) -> np.ndarray:
        """The largest ‖w(μ)‖ there was, for each of ``mu``."""
        most = 1 + len(self._steps)
        parts, square, largest = np.zeros((most, len(mu))), np.ones_like(mu), np.ones_like(mu)
        parts[0], size = 1.0, 1
        for step in self._steps:
            if isinstance(step, np.ndarray):
                m, p = step.shape
                beside = parts[m:size].copy()
                parts[:p] = step.T @ parts[:m]
                parts[p : p + size - m] = beside
                size += p - m
                square = np.einsum("ij,ij->j", parts[:size], parts[:size])
                continue
            column, coupling = step
            if coupling == 0:
                break
            m = len(column)
            new = (mu * parts[size - 1] - column @ parts[:m]) / coupling
            parts[size], square, size = new, square + new**2, size + 1
            largest = np.maximum(largest, square)
            # What is ruled out stays so: its numbers need not grow beyond all bounds.
            gone = largest > _ENOUGH
            if gone.any():
                parts[:size, gone], square[gone] = 0.0, 0.0
        return np.sqrt(largest)
