"""What every solver works on and ends with: the product, and the solution.

Solvers see H through a product alone, of vectors that are one flat buffer a `FlatGroup`; a basis is
a panel a group. Small matrices are NumPy in float64. Products are differences of gradients, so the
projected matrix isn't quite symmetric: its whole is kept, and what is not symmetric in it tells how
good the differences are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from lyapcuda.basis import Basis
from lyapcuda.solvers.convergence import ConvergenceStatus

__all__ = ["Product", "Report", "Solution", "finite", "on_host"]

#: Writes H times the first to the second, divided by the norm of the first, where that is given (it
#: is 1 otherwise); returns a loss.
Product = Callable[..., Tensor]
#: Called with the status of every iteration.
Report = Callable[[ConvergenceStatus], None]


@dataclass
class Solution:
    """What a solver ended with: the status, the eigenvectors, and how it went."""

    status: ConvergenceStatus
    vectors: Basis
    iterations: int
    #: Values and residuals of every iteration.
    history: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def on_host(tensor: Tensor) -> np.ndarray:
    """Dot products of an iteration; FloatingPointError where one isn't finite."""
    return finite(tensor.cpu().numpy())


def finite(values: np.ndarray) -> np.ndarray:
    """The same; FloatingPointError where one isn't finite."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            "a gradient beside θ isn't finite (or the parameters' precision doesn't show a "
            "displacement of this size: try a larger perturbation)"
        )
    return values
