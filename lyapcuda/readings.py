"""What a tracker's separations tell, as device tensors: no synchronisation until they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lyapcuda.dynamics.benettin import Benettin
from lyapcuda.dynamics.separation import Separation
from lyapcuda.params.flat import FlatLayout

if TYPE_CHECKING:
    from lyapcuda.history import CurvatureHistory, Ring

__all__ = ["Readings", "joined", "schwarz"]


def schwarz(rayleigh: Tensor, residual: Tensor) -> Tensor:
    """The Schwarz quotient y·y/(q·y) = ρ + r²/ρ, kept within [ρ − r, ρ + r]."""
    larger = torch.maximum(residual, rayleigh.abs())
    beyond = torch.where(larger > 0, residual * (residual / larger), 0.0)
    return rayleigh + rayleigh.sign() * beyond


def joined(ends: Sequence[Tensor]) -> Tensor:
    """Values of both ends (..., k), or of one, in the tracker's order: the lower end comes from its
    outer end inwards, and so is turned around.
    """
    return torch.cat([ends[0], *(end.flip(-1) for end in ends[1:])], dim=-1)


class Readings:
    """The values of one or two separations (the ends of the spectrum), in one order.

    Everything here is a copy: later steps don't change it.
    """

    _layout: FlatLayout
    _perturbation: float | None
    _history: Ring | None
    _calls: int
    #: An end of the spectrum each; none before the first step.
    _separations: list[Separation | Benettin]
    k: int
    every: int
    which: str

    def _values(self, name: str) -> Tensor:
        """A value for every eigenvalue: 0-dim for k = 1, else (k,)."""
        shape = () if self.k == 1 else (self.k,)
        if not self._separations:
            return torch.full(shape, math.nan, dtype=torch.float64, device=self._layout.device)
        found = [s.value(name).reshape(-1).to(self._layout.device) for s in self._separations]
        return joined(found).reshape(shape)

    def _scalar(self, name: str, unmeasured: float = math.nan) -> Tensor:
        """A value for every map: 0-dim, for "BE" (2,), the upper end's and the lower end's."""
        shape = (2,) if self.which == "BE" else ()
        if not self._separations:
            return torch.full(shape, unmeasured, dtype=torch.float64, device=self._layout.device)
        return torch.stack([s.value(name) for s in self._separations]).reshape(shape)

    @property
    def h(self) -> Tensor:
        """The eigenvalues, by the chosen estimate: float64 on the device, 0-dim for k = 1, else
        (k,); NaN at first.
        """
        return self._values("h")

    @property
    def h_ema(self) -> Tensor:
        """Exponential moving average of `h`."""
        return self._values("h_ema")

    @property
    def rayleigh(self) -> Tensor:
        """ρ = q·y/‖q‖² (for k > 1 the Ritz values) of the last step, whatever the estimate."""
        return self._values("rayleigh")

    @property
    def residual(self) -> Tensor:
        """r = ‖y − ρq‖/‖q‖: some eigenvalue of the symmetric map q → y lies in [ρ − r, ρ + r]."""
        return self._values("residual")

    @property
    def schwarz(self) -> Tensor:
        """y·y/(q·y), the Schwarz quotient of the last step (for k > 1 of each Ritz vector).

        It is the Rayleigh quotient half a step on, so nearer to the eigenvalue than ρ where q lags
        behind, and where no eigenvalue is negative never beyond the largest of the minibatch
        measured. Of a small part of a minibatch it is that part's, which is larger than the
        whole's. One-sided: its error is of first order in Δq.
        """
        return schwarz(self._values("rayleigh"), self._values("residual"))

    @property
    def interval(self) -> Tensor:
        """(2,), for k > 1 (k, 2), float64: some eigenvalue lies within, up to second order in Δq.

        Its middle is the mean of the last two Rayleigh quotients (with ``estimate="paper"``, the
        last), which look from opposite sides of θ; half its length is the mean of their residuals
        plus half their difference. On a changing minibatch that holds the change as well.
        With ``estimate="schwarz"`` the middle is `h`, the last Schwarz quotient s, and half the
        length ‖y − sq‖/‖q‖ plus half of what s has changed: up to first order in Δq.
        """
        center, width = self._values("center"), self._values("width")
        return torch.stack([center - width, center + width], dim=-1)

    @property
    def exponent(self) -> Tensor:
        """λ, the Lyapunov exponents of the last step: log(‖d‖/‖q‖), for k > 1 those of
        Gram–Schmidt, log(R_ii/Δq).
        """
        return self._values("exponent")

    @property
    def beta(self) -> Tensor:
        """The ascent rate (for "SA" the descent rate) of the next step; for "BE" both, (2,)."""
        return self._scalar("beta")

    @property
    def steps(self) -> Tensor:
        """How many measurements were taken (0-dim float64; for "BE" (2,), as for `skipped`)."""
        return self._scalar("steps", 0.0)

    @property
    def skipped(self) -> Tensor:
        """How many were left out because a loss or gradient wasn't finite."""
        return self._scalar("skipped", 0.0)

    @property
    def reseeds(self) -> Tensor:
        """How often a separation was lost (it was nothing, or lay in the span of the others, or the
        copies met under a ``beta`` of yours) and another, of random direction, took its place.
        """
        return self._scalar("reseeds", 0.0)

    @property
    def perturbation(self) -> float | None:
        """Δq: as given, or as chosen at the first step (None before)."""
        if not self._separations:
            return self._perturbation
        return float(self._separations[0].value("perturbation"))

    def vector(self, i: int = 0) -> list[Tensor]:
        """q_i, the separation of value i: shaped like the parameters, in their order; norm Δq.

        Raises:
            RuntimeError: before the first step.
            IndexError: i is not in 0..k-1.
        """
        if not self._separations:
            raise RuntimeError("vector(): nothing was measured yet")
        if not 0 <= i < self.k:
            raise IndexError(f"i={i}: expected 0 to {self.k - 1}")
        found = [separation.vectors() for separation in self._separations]
        if self.which == "BE":
            found[1].reverse()
        return [vector for end in found for vector in end][i]

    def history(self, after: int = 0) -> CurvatureHistory:
        """The measurements so far, as many as the buffer holds, as columns on the host.

        Args:
            after: leaves out the first so many measurements (all ever taken count).

        Raises:
            RuntimeError: the tracker was made with ``history=0``.
        """
        return self._kept("history()").read(after)

    @property
    def recorded(self) -> int:
        """How many measurements went into `history` since the start. Waits for the device."""
        return self._kept("recorded").recorded

    @property
    def history_capacity(self) -> int:
        """How many measurements `history` keeps; 0 for none."""
        return 0 if self._history is None else self._history.capacity

    @property
    def due(self) -> bool:
        """Whether the next step measures (``every``)."""
        return self._calls % self.every == 0

    @property
    def calls(self) -> int:
        """How many steps were taken, measured or not."""
        return self._calls

    def _kept(self, what: str) -> Ring:
        if self._history is None:
            raise RuntimeError(f"{what}: this tracker was made with history=0")
        return self._history
