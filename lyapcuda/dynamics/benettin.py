"""Benettin's scheme for k separations: the leading k eigenvalues from k + 1 gradients a step.

All k copies take the same step; Gram–Schmidt, as CholeskyQR on the compiled ops, keeps their
separations orthogonal, and the diagonal of R holds the Lyapunov exponents (paper, App. C). Of the
k×k projections of the Hessian on the separations come Ritz values with their residuals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.dynamics.options import GrowthOptions
from lyapcuda.dynamics.perturbation import adapted_perturbation, chosen_perturbation
from lyapcuda.dynamics.separation import reseed_, state_on
from lyapcuda.objective.evaluator import Gradients, lacks_any
from lyapcuda.params.copies import Copies, Copy
from lyapcuda.params.flat import FlatGroup, FlatLayout, squared_norm
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.saved_state import check_finite, check_shapes, require_entries

__all__ = ["Benettin"]


class _GroupPanel:
    """The flat buffers of one group, k rows each: q, and in turns θ + q, the gradients there, d."""

    def __init__(self, group: FlatGroup, k: int, momentum: float) -> None:
        self.group = group
        shape = (k, group.length)
        self.q = torch.zeros(shape, dtype=group.buffer_dtype, device=group.device)
        self.copies = torch.zeros(shape, dtype=group.dtype, device=group.device)
        # 16-bit gradients can't hold d; others make room for it where they lie.
        self.d = torch.zeros_like(self.q) if group.rounds else self.copies
        self.p = torch.zeros_like(self.q) if momentum else None
        self.p_next = torch.zeros_like(self.q) if momentum else None


class Benettin:
    """q_1 … q_k, orthogonal and of norm Δq, and the scalars of their growth, on the device.

    A step is `place` (writes every θ + q_j), the user's k + 1 gradients, `measure` and `conclude`,
    as for `lyapcuda.dynamics.separation.Separation`. Memory at rest: two panels of k·N floats; for
    16-bit parameters one more of those, with momentum two more.

    With an estimate from quotients ("rayleigh", "schwarz") the separations are turned to the Ritz
    vectors at every step, which leaves their span alone: q_i then belongs to value i. The other
    estimates keep Benettin's own basis, whose exponents they are read from.
    """

    def __init__(self, layout: FlatLayout, k: int, sign: int, options: GrowthOptions) -> None:
        self.layout, self.k, self._sign, self._seed = layout, k, sign, options.seed
        self._options = {
            **options.of_ops(sign),
            "realised": any(group.rounds for group in layout.groups),
            "rotate": options.estimate in ops.OF_QUOTIENTS,
        }
        self._fields = ops.state_fields(k)
        self._groups = [_GroupPanel(group, k, options.momentum) for group in layout.groups]
        self._copies = Copies(layout)
        self._perturbation = options.perturbation
        size = chosen_perturbation(layout, options.perturbation)
        self._randomise(options.seed, size)
        # β = 0 measures and orthogonalises without a step: the first one, unless β is known.
        self.state = ops.new_state(
            layout.device, k, perturbation=size, beta=options.first_rate
        )

    def adapt(self, epsilon: float, smooth: bool) -> None:
        """As `lyapcuda.dynamics.separation.Separation.adapt`."""
        size = adapted_perturbation(self.layout, self._perturbation, epsilon, smooth)
        if size is not None:
            self._field("perturbation").fill_(size)

    def _randomise(self, seed: int, size: float) -> None:
        """Fills every q_j with normal numbers of a generator of our own, of norm ``size``."""
        squares = [0.0] * self.k
        for number, part in enumerate(self._groups):
            generator = torch.Generator(part.group.device).manual_seed(seed + number)
            for j, row in enumerate(part.q):
                part.group.randomise_(row, generator)
                squares[j] += squared_norm(row)
        total = torch.tensor(squares, dtype=torch.float64, device=self.layout.device)
        squares = self.layout.reduce(total).tolist()
        for part in self._groups:
            for row, square in zip(part.q, squares, strict=True):
                row.mul_(size / math.sqrt(square))

    def _field(self, name: str, state: Tensor | None = None) -> Tensor:
        """One field of the state, a view."""
        offset, shape = self._fields[name]
        state = self.state if state is None else state
        return state[offset : offset + math.prod(shape)].view(shape)

    def value(self, name: str) -> Tensor:
        """One field of the state (float64 on the device; (k,) or 0-dim), a copy."""
        return self._field(name).clone()

    def restart_average(self) -> None:
        """Lets h_ema begin anew at the present h."""
        self._field("h_ema").copy_(self._field("h"))

    # --- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def place(self) -> list[list[Tensor]]:
        """Writes every θ + q_j; returns them, each in the order of `FlatLayout.parameters`."""
        for part in self._groups:
            part.group.check()
        for part in self._groups:
            group = part.group
            state = state_on(self.state, group.device)
            ops.recenter_(
                part.q,
                part.copies,
                part.d,
                group.segments(group.tensors),
                group.offsets,
                state,
            )
            if part.p is not None:
                transform, pending = self._field("transform", state), self._field("pending", state)
                ops.combine_(part.p, part.p_next, transform, gate=pending)
        self.withdraw()
        return [list(self._copy(j).tensors) for j in range(self.k)]

    def _copy(self, j: int) -> Copy:
        return self._copies.of([part.copies[j] for part in self._groups])

    def withdraw(self) -> None:
        """The separations stay as they are until the next `conclude`."""
        self._field("pending").zero_()

    #: As `Separation.needs_probe`: the first step measures and orthogonalises with β = 0.
    needs_probe = False

    @property
    def sums(self) -> int:
        """Numbers that `measure` returns."""
        blocks = 2 + self._options["realised"] + bool(self._options["momentum"])
        return (blocks * self.k) ** 2

    @torch.no_grad()
    def measure(self, found: Gradients) -> Tensor:
        """Steps all copies along their gradients, to every d_j; returns the Gram matrix over this
        rank's elements.
        """
        for j, gradients in enumerate(found.copies):
            if lacks_any(gradients):
                views = zip(gradients, self._copy(j).tensors, strict=True)
                torch._foreach_zero_([view for gradient, view in views if gradient is None])
        total = None
        for part in self._groups:
            group = part.group
            moved: dict[str, Any] = {}
            if self._options["realised"]:
                moved["theta"] = group.segments(group.tensors)
            if part.p is not None:
                moved.update(momentum=self._options["momentum"], p=part.p, p_next=part.p_next)
            gram = ops.ascent_(
                part.d,
                part.q,
                group.segments(group.own(found.g0)),
                part.copies,
                group.offsets,
                state_on(self.state, group.device),
                sign=self._sign,
                weight_decay=group.weight_decay,
                **moved,
            ).to(self.state.device)
            total = gram if total is None else total + gram
        return total

    def conclude(self, gram: Tensor, losses: Tensor) -> None:
        """Takes the growth, by the Gram matrix over all elements, into the state."""
        ops.benettin_(self.state, gram, losses, self.k, **self._options)
        ranks = self.layout.ranks
        # Where it can be read back anyway: an exchange less.
        skip = ranks is not None and ranks.reads_back(self.state.device)
        if not skip or self._field("again"):
            ops.benettin_refine_(self.state, self.layout.reduce(self._second_gram()), self.k)
        panels, momenta = [part.q for part in self._groups], [part.p for part in self._groups]
        reseed_(self.layout, panels, momenta, self.state, self._seed)

    def _second_gram(self) -> Tensor:
        """The first part of the second pass of CholeskyQR, where the diagonal of R asked for it:
        applies the transform, and returns the Gram matrix over this rank's elements.
        """
        total = None
        for part in self._groups:
            state = state_on(self.state, part.q.device)
            transform, again = self._field("transform", state), self._field("again", state)
            ops.combine_(part.d, part.d, transform, gate=again)
            if part.p_next is not None:
                ops.combine_(part.p_next, part.p_next, transform, gate=again)
            gram = ops.gram(part.d, part.d, gate=again).to(self.state.device)
            total = gram if total is None else total + gram
        return total

    @property
    def stepped(self) -> list[Tensor]:
        """The d of every group, (k, n): while the state says that a transform is pending, the next
        separations are combinations of its rows.
        """
        return [part.d for part in self._groups]

    # --- reading and saving ----------------------------------------------------------------------

    def _settled(self, part: _GroupPanel, now: Tensor, following: Tensor) -> Tensor:
        """The rows of a panel as the next `place` will leave them, a copy."""
        state = state_on(self.state, now.device)
        out = now.clone()
        ops.combine_(
            out, following, self._field("transform", state), gate=self._field("pending", state)
        )
        return out

    def vectors(self) -> list[list[Tensor]]:
        """The separations, each shaped like the parameters, in their order (copies)."""
        panels = [self._settled(part, part.q, part.d) for part in self._groups]
        return [self.layout.unpack([panel[j] for panel in panels]) for j in range(self.k)]

    def replicate_(self, ranks: Ranks) -> None:
        """Takes over what the first rank has."""
        ranks.replicate_(self.state)
        if not ranks.sharded:
            for part in self._groups:
                ranks.replicate_(part.q)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only; every tensor a copy. q and p are shaped like the
        parameters, with k rows in front, in their order.
        """
        state = self.state.clone()
        self._field("pending", state).zero_()
        momenta = [
            self._settled(part, part.p, part.p_next) for part in self._groups if part.p is not None
        ]
        return {
            "state": state,
            "q": self.layout.unpack([self._settled(part, part.q, part.d) for part in self._groups]),
            "p": self.layout.unpack(momenta) if momenta else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`; a mismatch is a ValueError, before anything changes."""
        require_entries(saved, "state", "q", "p")
        check_shapes("state", [self.state], [saved["state"]])
        momenta = [part.p for part in self._groups if part.p is not None]
        check_shapes("q", self.layout.unpack([part.q for part in self._groups]), saved["q"])
        saved_p = [] if saved["p"] is None else saved["p"]
        check_shapes("p", self.layout.unpack(momenta) if momenta else [], saved_p)
        check_finite("q", saved["q"])
        check_finite("p", saved_p)
        rates = [self._field(name, saved["state"]) for name in ("perturbation", "beta")]
        check_finite("state", rates)
        self.state.copy_(saved["state"])
        self.layout.pack_([part.q for part in self._groups], saved["q"])
        if momenta:
            self.layout.pack_(momenta, saved_p)
