"""Δq, the norm of a separation: large enough for the gradients' rounding, small for their bend."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lyapcuda.arguments import users_level
from lyapcuda.objective.loss_graph import COARSE
from lyapcuda.params.flat import FlatLayout

__all__ = [
    "FINE",
    "Extent",
    "active_sums",
    "chosen_perturbation",
    "default_perturbation",
    "largest_perturbation",
    "pieces",
    "separation_size",
]


# A tracker's Δq in ε^(1/3)·‖θ‖: at most; on smooth losses that over √N, but at least that over
# N^(1/4) (below which, in very large nets, single parameters would hardly move).
_MOST, _SMOOTH, _SMOOTH_LEAST = 0.25, 8.0, 0.15
# Of one side of θ alone, on a smooth loss, the error is of first order in Δq, and it is this many
# times ε^(1/2), in place of ε^(1/3), that balances that: a quarter in float32.
_ONE_SIDED = 3.6
# Over √N, where the arithmetic is coarser than the parameters: what a tracker starts from.
_COARSER = 2.0

# Rounding errors of a difference fall as 1/Δq, its own error grows as Δq (forward) or Δq²
# (central): Δq = c·ε^p·size balances them. The size that sets the scale of the third derivatives is
# not ‖θ‖, which grows with every layer and unit, but about the norm of one layer as a matrix:
# ‖θ‖/N^(1/4).
_SIZES = {"forward": (0.7, 1 / 2), "central": (0.3, 1 / 3)}
# On the tests' nets, the curvature changes by as much as itself over about so many sizes, at least.
_LENGTH = 0.5
# Where the gradient jumps (ReLU), a smaller Δq than this many sizes counts single jumps.
_KINKED = 0.2
#: An ε below this is float64's.
FINE = 1e-12
# Smaller than this many ε·‖θ‖, most elements of 16-bit parameters would not move at all.
_LEAST = 0.3

# Elements that are added up at a time.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Extent:
    """The elements that count: those that get a gradient.

    Attributes:
        norm: of θ over them.
        numel: how many they are.
    """

    norm: float
    numel: int

    @classmethod
    def of(cls, layout: FlatLayout, square: float, number: float) -> Extent:
        """From Σθ² over them, and their number."""
        if not 0 < number < layout.numel:
            return cls.whole(layout)
        return cls(math.sqrt(square), int(number))

    @classmethod
    def whole(cls, layout: FlatLayout) -> Extent:
        """All of them. Reads ‖θ‖ back to the host."""
        return cls(layout.norm(), layout.numel)

    @property
    def size(self) -> float:
        """‖θ‖, and what stands in for it where parameters start at zero."""
        return max(self.norm, 1e-2 * math.sqrt(self.numel))


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, cut alike, so that no copy of the whole is made."""
    flat = [t.reshape(1) if t.dim() == 0 else t for t in tensors]
    rows = max(1, _PIECE * len(flat[0]) // max(flat[0].numel(), 1)) if flat else 1
    return zip(*(t.split(rows) for t in flat), strict=True)


def active_sums(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Σθ² over the elements whose gradient isn't zero, and how many these are.

    An embedding has rows that no sample uses: they say nothing about the distance over which the
    loss changes.
    """
    square = number = torch.zeros((), dtype=torch.float64, device=device)
    for t, g in zip(parameters, gradients, strict=True):
        for here, slope in pieces(t, g) if g is not None else ():
            there = slope != 0
            square = square + torch.where(there, here, 0.0).double().square().sum().to(square)
            number = number + there.sum().to(square)
    return square, number


def _size(layout: FlatLayout) -> float:
    return Extent.whole(layout).size


def largest_perturbation(layout: FlatLayout, epsilon: float, extent: Extent | None = None) -> float:
    """The largest Δq that gradients computed to ``epsilon`` are given: ε^(1/3)·‖θ‖/4."""
    extent = extent or Extent.whole(layout)
    return _MOST * epsilon ** (1.0 / 3.0) * extent.size


def default_perturbation(
    layout: FlatLayout,
    epsilon: float | None = None,
    smooth: bool = False,
    extent: Extent | None = None,
    one_sided: bool = False,
) -> float:
    """A tracker's Δq for gradients computed to ``epsilon`` (default: in the parameters' precision):
    ε^(1/3)·max(‖θ‖, √N/100)/4; less for large nets, where the loss is known to be ``smooth`` or
    ``epsilon`` is coarser than the parameters; but never for 16-bit parameters.

    Rounding errors of a gradient difference grow as 1/Δq. Its own error is of first order in Δq,
    but of opposite sign on the two sides of θ, which the tracker visits in turns: their mean is
    left with the second order, and ε^(1/3) balances that. The second scale stands in for parameters
    that start at zero. Measured on small smooth nets in bench/perturbation.py. ‖θ‖ grows with every
    layer and unit, the distance over which the curvature changes doesn't: bench/tracking_scale.py
    measures nets of 0.7 to 11 million parameters, of which c·ε^(1/3)·‖θ‖/N^(1/4) suits all with
    c = 0.1 to 0.2. Under autocast or in TF32 a tracker starts from 2·ε^(1/3)·‖θ‖/√N, and goes on to
    what the gradients' noise asks for (`lyapcuda.dynamics.sizing`). Kinks (ReLU) want a larger Δq,
    so as not to count single ones, whatever the arithmetic.

    Args:
        layout: of the parameters.
        epsilon: machine epsilon of what the gradients are computed in.
        smooth: whether the loss is known to have no kinks.
        one_sided: whether values aren't means of both sides of θ; counts where ``smooth``.
        extent: what of θ counts, all of it by default: parameters without a gradient (an
            embedding's rows that a batch doesn't use) have no part in the curvature.
    """
    extent = extent or Extent.whole(layout)
    stored, n = max(torch.finfo(group.dtype).eps for group in layout.groups), extent.numel
    epsilon = layout.epsilon() if epsilon is None else epsilon
    if stored > COARSE:  # at less, most elements would not move at all
        factor = _MOST
    elif epsilon > stored:
        factor = min(_MOST, _COARSER / math.sqrt(n))
    else:
        factor = min(_MOST, max(_SMOOTH / math.sqrt(n), _SMOOTH_LEAST / n**0.25))
    share = factor * epsilon ** (1.0 / 3.0)
    if smooth and one_sided:
        share = factor * _ONE_SIDED * epsilon**0.5
    if not smooth:
        share = max(share, _MOST * stored ** (1.0 / 3.0))
    return share * extent.size


def separation_size(
    layout: FlatLayout,
    difference: str,
    kinked: bool = False,
    epsilon: float | None = None,
    length: float = math.inf,
    extent: Extent | None = None,
) -> float:
    """Δq for a difference of gradients that are computed to ``epsilon`` (default: the parameters'
    precision).

    ``length``: where it is known, the distance over which the curvature changes by as much as it
    is (`lyapcuda.solvers.difference_error`). ``extent``: of the parameters that get a gradient
    (default: of all).
    """
    factor, power = _SIZES[difference]
    epsilon = layout.epsilon() if epsilon is None else epsilon
    extent = Extent(layout.norm(), layout.numel) if extent is None else extent
    size = extent.size / extent.numel**0.25
    # The Δq that balances the errors goes as length^(1 − p).
    size *= min(1.0, length / (_LENGTH * size)) ** (1.0 - power)
    # In float64 a Δq is affordable that crosses none.
    least = _KINKED * size if kinked and epsilon > FINE else 0.0
    return max(factor * epsilon**power * size, _LEAST * epsilon * extent.norm, least)


def chosen_perturbation(layout: FlatLayout, perturbation: float | None) -> float:
    """Δq to start with: the user's, with a warning where the parameters' rounding would swallow it,
    or the default.
    """
    advised = default_perturbation(layout)
    if perturbation is None:
        return advised
    least = default_perturbation(layout, smooth=True)
    if perturbation < max(layout.epsilon() * layout.norm(), least / 30.0):
        warnings.warn(
            f"perturbation={perturbation:g} is small for the parameters' precision: the difference "
            f"of gradients will be rounding for a good part; {least:.1g} is advised, and "
            f"{advised:.1g} where the loss has kinks (ReLU)",
            stacklevel=users_level(),
        )
    return perturbation
