"""All separations that a tracker carries: those of one end of the spectrum, or of both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import described
from lyapcuda.dynamics.benettin import Benettin
from lyapcuda.dynamics.options import SIGNS, GrowthOptions
from lyapcuda.dynamics.refinement import Refinement
from lyapcuda.objective.evaluator import Gradients, Probe
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.ranks import Ranks
from lyapcuda.stability.metric import Metric

__all__ = [
    "BESIDE",
    "ENDS",
    "End",
    "Separations",
    "ends_of",
    "joined",
    "per_value",
    "scalar_fields",
    "schwarz_quotient",
]

#: Sums that ranks exchange at every step beside those of the separations (see `sizing`).
BESIDE = 4
#: The ends of the spectrum that each `which` asks for.
ENDS = {"LA": ("LA",), "SA": ("SA",), "BE": ("LA", "SA")}


@dataclass(frozen=True)
class End:
    """An end of the spectrum ("LA" or "SA"), and how many eigenvalues of it are followed."""

    which: str
    k: int


def ends_of(which: str, k: int, numel: int) -> list[End]:
    """The ends that share the k eigenvalues of ``numel`` parameters.

    Raises:
        ValueError: naming k, where there are too many or too few.
    """
    if k > numel:
        raise ValueError(f"k={k}: there are only {numel} parameters")
    if which == "BE" and k < 2:
        raise ValueError(f'k={k}: which="BE" needs at least 2, one eigenvalue from either end')
    ks = [k] if which != "BE" else [(k + 1) // 2, k // 2]
    if max(ks) > ops.MAX_K:
        raise ValueError(f"k={k}: at most {ops.MAX_K} from either end of the spectrum")
    return [End(end, each) for end, each in zip(ENDS[which], ks, strict=True)]


def schwarz_quotient(rayleigh: Tensor, residual: Tensor) -> Tensor:
    """y·y/(q·y) = ρ + r²/ρ, kept within [ρ − r, ρ + r]."""
    larger = torch.maximum(residual, rayleigh.abs())
    beyond = torch.where(larger > 0, residual * (residual / larger), 0.0)
    return rayleigh + rayleigh.sign() * beyond


def joined(ends: Sequence[Tensor]) -> Tensor:
    """Values of the ends (..., k), in the tracker's order.

    The lower end comes from its outer end inwards, so it is turned around.
    """
    return torch.cat([ends[0], *(end.flip(-1) for end in ends[1:])], dim=-1)


def per_value(values: Tensor, dim: int = 0) -> Tensor:
    """What every eigenvalue has, in the shape that users see: with an axis of k, the first but for
    steps in front of it (``dim``); where there is a single one, without that axis.
    """
    return values.squeeze(dim)


def scalar_fields(k: int) -> dict[str, slice]:
    """Where the scalars, and the vectors of k, stand in the state of k separations, by name.

    They come first in it: what follows are matrices.
    """
    table = ops.state_fields(k)
    end = table["r"][0]
    return {
        name: slice(offset, offset + math.prod(shape))
        for name, (offset, shape) in table.items()
        if offset < end
    }


class Separations:
    """The separations of every end, stepped together.

    A step is `place`, the user's gradients at θ and at every copy, and `advance`; after an
    exception of the closure `excuse` instead.

    Args:
        layout: of the parameters.
        ends: from `ends_of`.
        options: of the map.
        metric: as of `Benettin`.
    """

    def __init__(
        self,
        layout: FlatLayout,
        ends: Sequence[End],
        options: GrowthOptions,
        metric: Metric | None = None,
    ) -> None:
        self._layout = layout
        signed = [(SIGNS[end.which], end.k) for end in ends]
        self._refinement = None
        if options.tolerance is not None:
            self._refinement = Refinement(layout, signed, options.tolerance, options.exact, metric)
        self._of = [
            Benettin(layout, k, sign, options, copies, metric)
            for (sign, k), copies in zip(signed, self._panels(len(signed)), strict=True)
        ]
        # What the next exchange has of sums and losses; and whether all ranks raise in it.
        self._awaited, self._stops = 0, False
        #: Of a gradient difference, its norm, as far as it is known: no residual gets below it.
        self.noise = 0.0

    def _panels(self, ends: int) -> list[list[Tensor | None] | None]:
        """Those in which gradients at the copies outlast the step, of every end."""
        if self._refinement is None:
            return [None] * ends
        return [self._refinement.copies(end) for end in range(ends)]

    def __iter__(self) -> Iterator[Benettin]:
        return iter(self._of)

    # --- a step ----------------------------------------------------------------------------------

    @property
    def refines(self) -> bool:
        """Whether a step may need further gradients, from the probe that `advance` takes."""
        return self._refinement is not None

    def place(self) -> list[list[Tensor]]:
        """As `Benettin.place`, of every end."""
        self._awaited = 1 + BESIDE + sum(s.k + s.sums for s in self._of)
        self._stops = False
        if self._refinement is not None:
            self._refinement.gradients, self._refinement.along_gradient = 0, math.nan
        return [copy for separation in self._of for copy in separation.place()]

    def resize(self, size: float) -> None:
        """Takes another Δq, from the next separations on."""
        for separation in self._of:
            separation.resize(size)

    def widen(self, noise: float, doubt: float) -> None:
        """Adds the noise of a gradient difference, and doubt, to the last step's error bars."""
        for separation in self._of:
            separation.widen(noise, doubt)

    def suit(self, smooth: bool) -> None:
        """Takes the estimate that suits the loss, unless the user chose one."""
        for separation in self._of:
            separation.suit(smooth)

    def advance(
        self, found: Gradients, beside: Tensor | None = None, probe: Probe | None = None
    ) -> Tensor | None:
        """Steps all of them along their gradients, with one exchange among the ranks.

        Args:
            found: the gradients at θ and at the copies that `place` returned, in that order.
            beside: further float64 sums over this rank's elements, `BESIDE` of them; or zeros.
            probe: evaluates at further copies, where residuals ask for it: one number is read back
                then at every step, and there is an exchange more for every such copy.

        Returns:
            ``beside``, over all elements.

        Raises:
            RankError: on all ranks, where one of them failed; the states are as they were then.
        """
        ranks, device = self._layout.ranks, self.state.device
        losses = torch.stack([x.to(device, torch.float64) for x in (found.loss0, *found.losses)])
        parts, spans, first = [], [], 0
        for separation in self._of:
            parts.append(found.of(first, separation.k))
            spans.append(slice(first + 1, first + 1 + separation.k))
            first += separation.k
        sums = [s.measure(part) for s, part in zip(self._of, parts, strict=True)]
        if ranks is not None:
            beside = self.state.new_zeros(BESIDE) if beside is None else beside
            (*sums, beside), losses = ranks.exchange([*sums, beside], losses, now=self.refines)
        alone = len(self._of) == 1
        own = [losses if alone else torch.cat([losses[:1], losses[span]]) for span in spans]
        if probe is not None:
            sums, further = self._refined(sums, own, probe)
            own = [torch.cat([part, further]) for part in own]
        for separation, total, part in zip(self._of, sums, own, strict=True):
            separation.conclude(total, part, coarse=self.noise > 0.0)
        if self._refinement is not None:
            self._refinement.turns.tick()
        return beside

    def _refined(
        self, sums: list[Tensor], losses: list[Tensor], probe: Probe
    ) -> tuple[list[Tensor], Tensor]:
        """The products to conclude with, after as many further gradients as it takes, and the
        losses there.
        """
        tol, zipped = self._refinement.tolerance.tol, zip(self._of, sums, losses, strict=True)
        found = torch.stack(
            [s.unsettled(total, part, tol, self.noise) for s, total, part in zipped]
        ).tolist()
        accepted, asked = (all(x for x, _ in found), any(x for _, x in found))
        # Differences that kinks are in say nothing of a vector that residuals don't ask for.
        linear = all(separation.linear for separation in self._of)
        refined = None
        if accepted and (asked or linear and self._refinement.due):
            self._stops = True
            refined = self._refinement.refine(self._of, probe, self._exchange, self.noise)
        return refined or (sums, self.state.new_zeros(0))

    def _exchange(self, sums: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        ranks = self._layout.ranks
        if ranks is None:
            return sums, loss
        (sums,), loss = ranks.exchange([sums], loss, now=True)
        return sums, loss.reshape(1)

    def refinement(self) -> list[float]:
        """What further columns are chosen by, for a checkpoint; empty without them."""
        return [] if self._refinement is None else self._refinement.turns.state()

    def load_refinement(self, saved: Any) -> None:
        """Takes over `refinement`; a ValueError where one of the two has none."""
        mine = self.refinement()
        if not isinstance(saved, list) or not all(
            isinstance(x, float) and math.isfinite(x) for x in saved
        ):
            raise ValueError(f"state_dict: refinement is {described(saved)}, expected numbers")
        if len(saved) != len(mine):
            raise ValueError(
                "state_dict: it is of a tracker "
                + ("without tol, this one has it" if mine else "with tol, this one has none")
            )
        if mine:
            self._refinement.turns.load(saved)

    @property
    def further(self) -> int:
        """Gradients that the last step took beyond one a separation."""
        return 0 if self._refinement is None else self._refinement.gradients

    @property
    def along_gradient(self) -> float:
        """As of `Refinement`; NaN without it."""
        return math.nan if self._refinement is None else self._refinement.along_gradient

    def excuse(self) -> None:
        """Instead of `advance`, on a rank whose closure raised.

        It takes part in the ranks' exchanges, so that the others hear of it and don't wait.
        """
        ranks, device = self._layout.ranks, self.state.device
        if ranks is None:
            return
        awaited = self._refinement.awaited if self._stops else self._awaited
        ranks.fail(awaited, device)
        if self.refines or ranks.reads_back(device):  # the others stopped there
            return
        for separation in self._of:
            separation.excuse()

    # --- reading ---------------------------------------------------------------------------------

    @property
    def state(self) -> Tensor:
        """The scalars of the first end (a live view)."""
        return self._of[0].state

    @property
    def states(self) -> list[Tensor]:
        """Those of every end."""
        return [separation.state for separation in self._of]

    def values(self, name: str) -> Tensor:
        """A field that every eigenvalue has: (k,), in the tracker's order, a copy."""
        return joined([s.value(name) for s in self._of])

    def scalars(self, name: str) -> Tensor:
        """A field that every end has: (ends,), a copy."""
        return torch.cat([s.value(name) for s in self._of])

    def vectors(self) -> list[list[Tensor]]:
        """q_0 … q_(k−1), each shaped like the parameters, in the tracker's order (copies)."""
        found = [separation.vectors() for separation in self._of]
        for lower in found[1:]:
            lower.reverse()
        return [vector for end in found for vector in end]

    @property
    def stepped(self) -> list[Tensor]:
        """As `Benettin.stepped`, of the first end."""
        return self._of[0].stepped

    @property
    def displacement(self) -> Tensor:
        """As of `Benettin.displacements`, of the first separation: (1,)."""
        return self._of[0].displacements[:1]

    # The three read back to the host.

    def accepted(self) -> bool:
        """Whether the last step counted, at both ends."""
        return bool(self.scalars("accepted").all())

    def size(self) -> float:
        """Δq."""
        return float(self.scalars("perturbation")[0])

    def largest(self) -> float:
        """The largest of the last Rayleigh quotients, whatever its sign.

        The same for all estimates: some of these count what isn't linear in q as curvature.
        """
        return float(self.values("rayleigh").abs().max())

    def restart_average(self) -> None:
        """Lets h_ema begin anew at the present h."""
        for separation in self._of:
            separation.restart_average()

    # --- ranks, saving ---------------------------------------------------------------------------

    def replicate_(self, ranks: Ranks) -> None:
        """Takes over what the first rank has."""
        for separation in self._of:
            separation.replicate_(ranks)

    def state_dict(self) -> list[dict[str, Any]]:
        """Tensors and plain containers only, an entry an end; every tensor is a copy."""
        return [separation.state_dict() for separation in self._of]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Takes over a `state_dict`, or after a ValueError nothing of it."""
        before = self.state_dict()
        try:
            for separation, values in zip(self._of, saved, strict=True):
                separation.load_state_dict(values)
        except BaseException:
            for separation, values in zip(self._of, before, strict=True):
                separation.load_state_dict(values)
            raise
