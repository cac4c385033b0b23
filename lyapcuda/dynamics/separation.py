"""One separation: Benettin's scheme for one vector.

Place the second copy at its distance, let both copies take the same step, read off how far they
parted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.dynamics.options import GrowthOptions
from lyapcuda.dynamics.perturbation import adapted_perturbation, chosen_perturbation
from lyapcuda.objective.evaluator import Gradients
from lyapcuda.params.copies import Copies
from lyapcuda.params.flat import FlatGroup, FlatLayout, squared_norm
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.saved_state import check_finite, check_shapes, require_entries

__all__ = [
    "Separation",
    "reseed_",
    "state_on",
]

_PIECE = 1 << 18


def state_on(state: Tensor, device: torch.device) -> Tensor:
    """The scalars where a group's buffers are."""
    return state if device == state.device else state.to(device)


def reseed_(
    layout: FlatLayout,
    buffers: Sequence[Tensor],
    momenta: Sequence[Tensor | None],
    state: Tensor,
    seed: int,
) -> None:
    """Puts another separation where the state says that one was lost; else a launch a group.

    Args:
        buffers, momenta: of every group, flat buffers or panels.
        seed: of the run; every group and every shard has its own.
    """
    parts = zip(layout.groups, buffers, momenta, layout.seeds(seed), strict=True)
    for group, buffer, p, own in parts:
        ops.reseed_(
            buffer,
            group.offsets,
            group.sizes,
            state_on(state, group.device),
            elements=layout.numel,
            seed=own,
            p=p,
        )


class _GroupSeparation:
    """The flat buffers of one group: q, and the other one, in turns θ + q and the next q; with
    momentum p, and the other one for the next p.
    """

    def __init__(self, group: FlatGroup, momentum: float) -> None:
        self.group = group
        self.q, self.spare = group.new_buffer(), group.new_buffer()
        # 16-bit parameters need a copy of their own type; others borrow the spare buffer.
        self._rounded = group.new_buffer(group.dtype) if group.rounds else None
        self.p = group.new_buffer() if momentum else None
        self.p_spare = group.new_buffer() if momentum else None

    @property
    def copy(self) -> Tensor:
        """The buffer that θ + q lies in."""
        return self.spare if self._rounded is None else self._rounded

    def turn(self) -> None:
        """What the step wrote becomes q and p; what they were stays until the next `place`, for a
        step that isn't committed.
        """
        self.q, self.spare = self.spare, self.q
        self.p, self.p_spare = self.p_spare, self.p


class Separation:
    """q, the separation of the two copies, and the scalars of its growth, all on the device.

    A step is `place` (writes θ + q and returns it as tensors shaped like the parameters), the
    user's two gradients, `measure` and `conclude`. `lyapcuda.dynamics.benettin.Benettin` has the
    same for k of them. Extra memory at rest: two N-float buffers, with momentum four; for 16-bit
    parameters one more copy of those.
    """

    def __init__(self, layout: FlatLayout, sign: int, options: GrowthOptions) -> None:
        self.layout, self._seed = layout, options.seed
        self._options = options.of_ops(sign)
        self._groups = [_GroupSeparation(group, options.momentum) for group in layout.groups]
        self._copies = Copies(layout)
        # β = 0 until the first gradients set it, except where the paper or the user says.
        self._needs_secant = options.first_rate == 0.0
        self._perturbation = options.perturbation
        size = chosen_perturbation(layout, options.perturbation)
        norm = self._randomise(options.seed)
        self.state = ops.new_state(
            layout.device, perturbation=size, scale=size / norm, beta=options.first_rate
        )

    def adapt(self, epsilon: float, smooth: bool) -> None:
        """Takes another Δq from the next q on: a larger one where the loss turned out to be
        computed more coarsely than the parameters are stored (to ``epsilon``: autocast, TF32), a
        smaller one where it turned out to be ``smooth``.
        """
        size = adapted_perturbation(self.layout, self._perturbation, epsilon, smooth)
        if size is not None:
            self.state[ops.STATE_FIELDS.index("perturbation")] = size

    def _randomise(self, seed: int) -> float:
        """Fills q with normal numbers of a generator of our own; returns the norm."""
        square = 0.0
        for number, part in enumerate(self._groups):
            generator = torch.Generator(part.group.device).manual_seed(seed + number)
            part.group.randomise_(part.q, generator)
            square += squared_norm(part.q)
        total = torch.tensor([square], dtype=torch.float64, device=self.layout.device)
        return math.sqrt(self.layout.reduce(total).item())

    #: How many copies there are beside θ.
    k = 1
    #: Numbers that `measure` returns.
    sums = 6

    @torch.no_grad()
    def place(self) -> list[list[Tensor]]:
        """Writes θ + q; returns the one copy, in the order of `FlatLayout.parameters`."""
        copy = self._copies.of([part.copy for part in self._groups])
        for part in self._groups:
            part.group.check()
        for part, segments in zip(self._groups, copy.segments, strict=True):
            group = part.group
            ops.recenter_(
                segments,
                part.q,
                part.spare,
                group.segments(group.tensors),
                group.offsets,
                state_on(self.state, group.device),
                p=part.p,
                p_previous=part.p_spare,
            )
        return [list(copy.tensors)]

    def withdraw(self) -> None:
        """After `place`, when no gradients came of it: q and p are whole and stay as they are."""
        self.state[ops.STATE_FIELDS.index("committed")] = 1.0

    @property
    def needs_probe(self) -> bool:
        """Whether there is no β to step with yet: `probe` comes first."""
        return self._needs_secant

    def start(self, sums: Tensor) -> None:
        """Sets β from the sums of `probe`, over all elements."""
        self._needs_secant = False
        ops.secant_(self.state, sums, sign=self._options["sign"])

    def conclude(self, sums: Tensor, losses: Tensor) -> None:
        """Takes the growth, by the sums over all elements, into the state."""
        ops.exponent_(self.state, sums, losses, **self._options)
        for part in self._groups:
            part.turn()
        kept = [part.spare for part in self._groups]  # when a step isn't committed
        momenta = [part.p_spare for part in self._groups]
        reseed_(self.layout, kept, momenta, self.state, self._seed)

    def probe(self, found: Gradients) -> Tensor:
        """The sums alone, before there is a β to step with. A piece at a time: the buffer that the
        next q goes to holds g1.
        """
        total = torch.zeros(len(ops.SUM_FIELDS), dtype=torch.float64, device=self.state.device)
        for part in self._groups:
            group, state = part.group, state_on(self.state, part.group.device)
            scratch = part.q.new_empty(min(_PIECE, part.q.numel()))
            lists = [
                group.segments(group.own(found.g0)),
                group.segments(group.own(found.copies[0])),
                group.segments(group.tensors),
            ]
            for offset, *tensors in zip(group.offsets, *lists, strict=True):
                g0, g1, theta = (tensor.view(-1) for tensor in tensors)
                for start in range(0, g0.numel(), _PIECE):
                    piece = slice(start, start + _PIECE)
                    length = g0[piece].numel()
                    total += ops.ascent_(
                        scratch[:length],
                        part.q[offset + start : offset + start + length],
                        [g0[piece]],
                        [g1[piece]],
                        [0],
                        state,
                        weight_decay=group.weight_decay,
                        theta=[theta[piece]] if group.rounds else None,
                    ).to(total.device)
        return total

    @torch.no_grad()
    def measure(self, found: Gradients) -> Tensor:
        """Steps both copies along their gradients: writes the next q and p beside the present ones;
        returns the sums over this rank's elements.
        """
        total = None
        copy = self._copies.of([part.copy for part in self._groups])
        # What usually are the tensors that `place` gave out.
        same = all(map(operator.is_, found.copies[0], copy.tensors))
        for part, segments in zip(self._groups, copy.segments, strict=True):
            group = part.group
            moved: dict[str, Any] = {}
            if group.rounds:
                moved["theta"] = group.segments(group.tensors)
            if part.p is not None:
                moved.update(momentum=self._options["momentum"], p=part.p, p_next=part.p_spare)
            sums = ops.ascent_(
                part.spare,
                part.q,
                group.segments(group.own(found.g0)),
                segments if same else group.segments(group.own(found.copies[0])),
                group.offsets,
                state_on(self.state, group.device),
                sign=self._options["sign"],
                weight_decay=group.weight_decay,
                **moved,
            ).to(self.state.device)
            total = sums if total is None else total + sums
        return total

    def restart_average(self) -> None:
        """Lets h_ema begin anew at the present h."""
        fields = ops.STATE_FIELDS
        self.state[fields.index("h_ema")] = self.state[fields.index("h")]

    def value(self, name: str) -> Tensor:
        """One field of the state (0-dim float64 on the device), a copy."""
        return self.state[ops.STATE_FIELDS.index(name)].clone()

    def _settled(self, now: Tensor, previous: Tensor) -> Tensor:
        """q or p as the next `place` will see it, whether or not the last step was committed."""
        kept = state_on(self.state, now.device)[ops.STATE_FIELDS.index("committed")] == 0
        return torch.where(kept, previous, now)

    def vectors(self) -> list[list[Tensor]]:
        """q itself, shaped like the parameters, in their order (copies): a list of one."""
        flats = []
        for part in self._groups:
            scale = state_on(self.state, part.q.device)[ops.STATE_FIELDS.index("scale")]
            flats.append((self._settled(part.q, part.spare) * scale).to(part.q.dtype))
        return [self.layout.unpack(flats)]

    def replicate_(self, ranks: Ranks) -> None:
        """Takes over what the first rank has."""
        ranks.replicate_(self.state)
        if not ranks.sharded:
            for part in self._groups:
                ranks.replicate_(part.q)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only; every tensor a copy. q and p are shaped like the
        parameters, in their order.
        """
        state = self.state.clone()
        momenta = [
            self._settled(part.p, part.p_spare) for part in self._groups if part.p is not None
        ]
        state[ops.STATE_FIELDS.index("committed")] = 1.0
        return {
            "state": state,
            "needs_secant": self._needs_secant,
            "q": self.layout.unpack([self._settled(part.q, part.spare) for part in self._groups]),
            "p": self.layout.unpack(momenta) if momenta else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`; a mismatch is a ValueError, before anything changes."""
        require_entries(saved, "state", "needs_secant", "q", "p")
        check_shapes("state", [self.state], [saved["state"]])
        momenta = [part.p for part in self._groups if part.p is not None]
        check_shapes("q", self.layout.unpack([part.q for part in self._groups]), saved["q"])
        saved_p = [] if saved["p"] is None else saved["p"]
        check_shapes("p", self.layout.unpack(momenta) if momenta else [], saved_p)
        check_finite("q", saved["q"])
        check_finite("p", saved_p)
        names = ("perturbation", "scale", "beta")
        check_finite("state", [saved["state"][ops.STATE_FIELDS.index(name)] for name in names])
        self.state.copy_(saved["state"])
        self._needs_secant = bool(saved["needs_secant"])
        self.layout.pack_([part.q for part in self._groups], saved["q"])
        if momenta:
            self.layout.pack_(momenta, saved_p)
