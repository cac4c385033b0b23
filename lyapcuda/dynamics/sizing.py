"""Δq of a tracker's separations, from the rounding noise that its first steps measure.

Where autograd's graph shows the whole of a loss, in full precision, Δq follows from the parameters
(`lyapcuda.dynamics.perturbation`). Where arithmetic is coarser (autocast, TF32) or hidden, only the
gradients tell how far rounding moves them. With y(δ) = g(θ + δ) − g(θ), the curvature cancels in
y(δ) + y(−δ): for a small δ the rest is noise, so one pair of gradients measures it. A difference of
gradients is then to be `_CLEAR` times as long as its noise. Longer ones bend. How much q itself
bends, y(q) + y(−q) tells, at one gradient each time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import described, users_level
from lyapcuda.dynamics.perturbation import (
    Extent,
    active_sums,
    default_perturbation,
    largest_perturbation,
    pieces,
)
from lyapcuda.dynamics.separations import BESIDE, Separations
from lyapcuda.objective.evaluator import Gradients
from lyapcuda.objective.loss_graph import COARSE, Sighting
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.saved_state import require_entries
from lyapcuda.params.shards import locals_of
from lyapcuda.stability.metric import Metric

__all__ = ["Sizing"]

#: How many times as long as its noise a difference of gradients is to be; at least, where it bends.
_CLEAR, _BENT = 16.0, 10.0
#: δ of the pair that measures noise, in q: its bend is 1/64 of what that of q is.
_PAIR = 1.0 / 8.0
#: Which measurements, from 0, have a pair, and which a mirror image of q beside them.
_PAIRED, _MIRRORED, _PERIOD = 1, (5, 9, 13), 100
#: A step changes Δq by this factor at most.
_STRIDE = 4.0
#: Relative errors of h from which on a warning says so: of one side of θ; of noise alone.
_UNSURE, _NOISY = 0.125, 0.12
#: From this error of one side of θ on nothing is known, and differences may be this much shorter.
_UNKNOWN, _SHORTER = 0.5, 0.25
#: Where no coarse arithmetic shows, one side that is so far off has met kinks.
_KINKED = 0.3

_NAMES = {torch.finfo(torch.bfloat16).eps: "bfloat16", 2.0**-10: "float16 or TF32"}


class Sizing:
    """Chooses Δq at the first measurements of a tracker, and looks again from time to time.

    A measurement is `probes`, the user's gradients there too, `sums`, the separations' step, and
    `take`. While `due` is False there is nothing of that to do, and nothing is read back.

    Attributes:
        noise: the norm of a gradient difference's rounding error; 0 where it wasn't measured.
        doubt: what else to add to the error bar: infinite where no Δq suits.

    Args:
        layout: of the parameters.
        given: Δq of the user's, which stays.
        follows: whether h is read off to choose Δq; False where it may well be zero.
        exact: there is nothing to choose: products are exact.
        one_sided: whether values are of one side of θ alone.
        metric: as of `Benettin`. Noise, and what bends, are then those of S·y over the displacement
            of the first separation, as products in the coordinates z have them.
    """

    def __init__(
        self,
        layout: FlatLayout,
        given: float | None,
        follows: bool = True,
        exact: bool = False,
        one_sided: bool = False,
        metric: Metric | None = None,
    ) -> None:
        self._layout, self._given, self._follows, self._exact = layout, given, follows, exact
        self._metric = metric
        self._one_sided = one_sided
        #: What the first evaluation showed of the loss.
        self.sighting = Sighting()
        self.noise = self.doubt = 0.0
        # Measurements so far; whether noise is to be measured; the smallest and largest Δq.
        self._count, self._measures, self._least, self._most = 0, False, 0.0, 0.0
        self._epsilon = 0.0  # of what the loss is computed in, as far as was seen
        self._coarse = False  # whether the loss was seen to be computed in coarser arithmetic
        self._first = 0.0  # Δq to start from
        # The multiple of the noise now, and the largest curvature seen.
        self._clear, self._largest, self._warned = _CLEAR, 0.0, False

    @property
    def watches(self) -> bool:
        """Whether the next evaluation is to be seen (`lyapcuda.objective.loss_graph.watching`)."""
        return self._count == 0

    @property
    def _paired(self) -> bool:
        return self._measures and (self._count == _PAIRED or self._rechecks)

    @property
    def _mirrored(self) -> bool:
        return self._measures and (self._count in _MIRRORED or self._rechecks)

    @property
    def _rechecks(self) -> bool:
        return self._count > 0 and self._count % _PERIOD == 0

    @property
    def due(self) -> bool:
        """Whether this measurement takes part in the choice."""
        if self._exact:
            return False
        first = self._count <= _MIRRORED[-1] and self._measures
        return self.watches or first or (self._measures and self._rechecks)

    # --- a measurement ---------------------------------------------------------------------------

    @torch.no_grad()
    def probes(self, copies: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """More copies beside θ that this measurement needs, from those of the separations."""
        if not (self._paired or self._mirrored):
            return []
        theta = list(locals_of([p.tensor for p in self._layout.parameters]))
        away = torch._foreach_sub(list(copies[0]), theta)
        sides = ([-1.0] if self._mirrored else []) + ([_PAIR, -_PAIR] if self._paired else [])
        return [list(torch._foreach_add(theta, away, alpha=side)) for side in sides]

    @torch.no_grad()
    def sums(self, found: Gradients, copies: int, displacement: Tensor) -> Tensor:
        """What `take` needs, over the elements of this rank: float64 sums.

        Args:
            found: the gradients at the separations' ``copies``, then at the `probes`.
            displacement: of the first separation, (1,).
        """
        device, probes = self._layout.device, found.copies[copies:]
        total = torch.zeros(BESIDE, dtype=torch.float64, device=device)
        if self.watches:
            theta = locals_of([p.tensor for p in self._layout.parameters])
            total[0], total[1] = active_sums(theta, found.g0, device)
        scales = None
        if self._metric is not None:
            scales = self._layout.views(self._metric.buffers)
        if self._mirrored:
            total[2] = _second_difference(found.g0, found.copies[0], probes[0], scales, device)
        if self._paired:
            total[3] = _second_difference(found.g0, *probes[-2:], scales, device)
        total[2:] /= displacement.square()
        return total

    def take(self, totals: Tensor, separations: Separations) -> None:
        """Chooses Δq by the sums over all ranks, after the separations' step. Reads back."""
        if not bool(separations.accepted()):
            return
        square, number, mirrored, paired = totals.tolist()
        if self.watches:
            self._start(Extent.of(self._layout, square, number), separations)
        else:
            if self._paired:
                self.noise = math.sqrt(paired / 3.0)  # of three gradients, one of them twice
            self._follow(mirrored, separations)
        self._count += 1

    def skip(self) -> None:
        """Instead of `take`, at a measurement that isn't `due`."""
        self._count += 1

    # --- the choice ------------------------------------------------------------------------------

    def _start(self, extent: Extent, separations: Separations) -> None:
        """Δq from what was seen of the loss."""
        layout, seen = self._layout, self.sighting
        stored = max(torch.finfo(group.dtype).eps for group in layout.groups)
        epsilon = max(seen.epsilon, layout.compute_epsilon)
        coarse = self._coarse = epsilon > stored
        self._epsilon = epsilon
        # 16-bit parameters: most elements of a smaller q wouldn't move at all.
        self._measures = stored <= COARSE and (coarse or not seen.shows_all)
        if self._measures:
            self._least = default_perturbation(layout, stored, smooth=True, extent=extent)
            self._most = default_perturbation(layout, stored, extent=extent)
            if coarse:
                self._most = max(self._most, largest_perturbation(layout, epsilon, extent))
        if self._given is not None:
            return
        if coarse:
            size = default_perturbation(layout, epsilon, smooth=self._measures, extent=extent)
        else:
            size = default_perturbation(
                layout,
                layout.epsilon(),
                smooth=self._measures or seen.smooth,
                extent=extent,
                one_sided=self._one_sided and seen.smooth,
            )
        self._first = size
        separations.resize(size)

    def _follow(self, mirrored: float, separations: Separations) -> None:
        """Δq as so many times the noise over the curvature, more where it doesn't bend."""
        size, curvature = separations.size(), separations.largest()
        if not math.isfinite(curvature):
            return
        share = self.noise / size
        if self._mirrored:
            self._mirror(math.sqrt(mirrored) / 2.0 / size, share, curvature)
            if self._count >= _MIRRORED[-1]:
                self._judge(math.sqrt(mirrored) / 2.0 / size, share, curvature, size)
        if not self._follows or self._given is not None:
            return
        # Where Δq bends, h falls: by the smaller value Δq would grow all the more.
        self._largest = curvature if self._rechecks else max(self._largest, curvature)
        wanted = self._clear * self.noise / self._largest if self._largest > 0.0 else math.inf
        wanted = min(max(wanted, size / _STRIDE), size * _STRIDE)
        wanted = min(max(wanted, self._least), self._most)
        # Noise all over: a large Δq would show no curvature at all, to which any rate seems safe.
        lost = self._mirrored and self._count >= _MIRRORED[-1] and share > curvature
        separations.resize(self._first if lost else wanted)

    def _mirror(self, apart: float, share: float, curvature: float) -> None:
        """Takes another multiple of the noise, by what q's two sides differ by: half of it is
        ``apart``, noise of three gradients and bend.
        """
        bend = math.sqrt(max(apart**2 - 0.75 * share**2, 0.0))
        if not self._coarse and bend > _KINKED * curvature:
            self._least = self._most
        least = _BENT if apart < _UNKNOWN * curvature else _BENT * _SHORTER
        ratio = math.sqrt(share / bend) if bend > 0.0 else math.inf
        self._clear = max(least, self._clear * min(max(ratio, 1.0 / _STRIDE), _STRIDE))

    def _judge(self, apart: float, share: float, curvature: float, size: float) -> None:
        """What is in doubt by now; says once that h isn't known well."""
        self.doubt = 0.0
        if apart > _UNKNOWN * curvature:
            self.doubt = math.inf
        elif apart > _UNSURE * curvature:
            self.doubt = apart
        if self._warned or not (self.doubt or share > _NOISY * curvature):
            return
        self._warned = True
        where = "parts of the loss can't be seen"
        if self._coarse:
            where = f"the loss is computed in {_NAMES.get(self._epsilon, 'coarse arithmetic')}"
        given = "Δq" if self._given is None else "perturbation"
        known = "not known" if self.doubt == math.inf else "not known well"
        parts = [x / curvature if curvature > 0.0 else math.inf for x in (share, apart)]
        warnings.warn(
            f"h={curvature:.3g} is {known}: {where}, and at {given}={size:.2g} the noise of a "
            f"difference of gradients, {self.noise:.2g}, is {parts[0]:.0%} of h; each side of θ is "
            f"{parts[1]:.0%} off. See tracker.interval and docs/precision.md"
            + self._advice(curvature),
            stacklevel=users_level(),
        )

    def _advice(self, curvature: float) -> str:
        if self._given is None or not curvature > 0.0:
            return ""
        return f"; perturbation={_CLEAR * self.noise / curvature:.1g} or none is advised"

    # --- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers only."""
        numbers = {name: float(getattr(self, f"_{name}")) for name in _SAVED}
        return {**numbers, "noise": self.noise, "doubt": self.doubt}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`.

        Raises:
            ValueError: before anything changes.
        """
        require_entries(saved, *_SAVED, "noise", "doubt")
        for name, value in saved.items():
            if not isinstance(value, float) or math.isnan(value):
                raise ValueError(f"state_dict: sizing's {name} is {described(value)}")
        for name in _SAVED:
            setattr(self, f"_{name}", saved[name])
        self._count, self._measures = int(saved["count"]), bool(saved["measures"])
        self._coarse, self._warned = bool(saved["coarse"]), bool(saved["warned"])
        self.noise, self.doubt = saved["noise"], saved["doubt"]


_SAVED = (
    *("count", "measures", "coarse", "epsilon", "least", "most", "first", "clear", "largest"),
    "warned",
)


def _second_difference(
    g0: Sequence[Tensor | None],
    plus: Sequence[Tensor | None],
    minus: Sequence[Tensor | None],
    scales: Sequence[Tensor] | None,
    device: torch.device,
) -> Tensor:
    """‖S·(plus + minus − 2·g0)‖², of which None is zero; without ``scales`` S is 1."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, (here, *beside) in enumerate(zip(g0, plus, minus, strict=True)):
        terms = [(g, f) for g, f in ((here, -2.0), *((g, 1.0) for g in beside)) if g is not None]
        own = [] if scales is None or not terms else [scales[i]]
        for cut in pieces(*(g for g, _ in terms), *own):
            parts = zip(cut, terms, strict=False)
            part = sum(piece.double() * factor for piece, (_, factor) in parts)
            part = part * cut[-1].double() if own else part
            total = total + part.square().sum().to(device)
    return total
