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

from lyapcuda import ops, panel_ops
from lyapcuda.evaluate import Gradients
from lyapcuda.flat import FlatGroup, FlatLayout, squared_norm
from lyapcuda.lyapunov import chosen_perturbation
from lyapcuda.saved import check_shapes, require_entries

__all__ = ["MAX_SEPARATIONS", "Benettin"]

#: How many separations the compiled ops take.
MAX_SEPARATIONS = 32


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

    A step is `place` (writes every θ + q_j), the user's k + 1 gradients, and `advance`, as for
    `lyapcuda.lyapunov.Separation`. Memory at rest: two panels of k·N floats; for 16-bit parameters
    one more of those, with momentum two more.

    With ``estimate="rayleigh"`` the separations are turned to the Ritz vectors at every step, which
    leaves their span alone: q_i then belongs to value i. The other estimates keep Benettin's own
    basis, whose exponents they are read from.
    """

    def __init__(
        self,
        layout: FlatLayout,
        k: int,
        *,
        sign: int,
        estimate: str,
        perturbation: float | None,
        beta: float | None,
        momentum: float,
        ema: float,
        seed: int,
    ) -> None:
        self.layout, self.k, self._sign = layout, k, sign
        self._options: dict[str, Any] = {
            "sign": sign,
            "estimate": ops.ESTIMATES[estimate],
            "momentum": momentum,
            "realised": any(group.rounds for group in layout.groups),
            "control": beta is None,
            "alternate": estimate != "paper",
            "rotate": estimate == "rayleigh",
            "ema": ema,
        }
        self._fields = panel_ops.panel_fields(k)
        self._groups = [_GroupPanel(group, k, momentum) for group in layout.groups]
        size = chosen_perturbation(layout, perturbation)
        self._randomise(seed, size)
        # β = 0 measures and orthogonalises without a step: the first one, unless β is known.
        start = beta if beta is not None else 1.0 if estimate == "paper" else 0.0
        self.state = panel_ops.new_panel_state(layout.device, k, perturbation=size, beta=start)

    def _randomise(self, seed: int, size: float) -> None:
        """Fills every q_j with normal numbers of a generator of our own, of norm ``size``."""
        squares = [0.0] * self.k
        for number, part in enumerate(self._groups):
            generator = torch.Generator(part.group.device).manual_seed(seed + number)
            for j, row in enumerate(part.q):
                for view in part.group.views(row):
                    view.normal_(generator=generator)
                squares[j] += squared_norm(row)
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

    def _state_on(self, device: torch.device) -> Tensor:
        return self.state if device == self.state.device else self.state.to(device)

    def restart_average(self) -> None:
        """Lets h_ema begin anew at the present h."""
        self._field("h_ema").copy_(self._field("h"))

    # --- a step ----------------------------------------------------------------------------------

    def place(self) -> list[list[Tensor]]:
        """Writes every θ + q_j; returns them, each in the order of `FlatLayout.parameters`."""
        copies: list[dict[int, Tensor]] = [{} for _ in range(self.k)]  # by position
        for part in self._groups:
            part.group.check()
        for part in self._groups:
            group = part.group
            state = self._state_on(group.device)
            panel_ops.panel_recenter_(
                part.q,
                part.copies,
                part.d,
                group.segments(group.tensors),
                group.offsets,
                state,
            )
            if part.p is not None:
                transform, pending = self._field("transform", state), self._field("pending", state)
                panel_ops.combine_(part.p, part.p_next, transform, gate=pending)
            for copy, row in zip(copies, part.copies, strict=True):
                copy.update(zip(group.positions, group.views(row), strict=True))
        self.withdraw()
        return [[copy[i] for i in range(len(copy))] for copy in copies]

    def withdraw(self) -> None:
        """The separations stay as they are until the next `advance`."""
        self._field("pending").zero_()

    def advance(self, found: Gradients) -> None:
        """Steps all copies along their gradients and takes the growth into the state."""
        total = self._ascend(found)
        losses = torch.stack([loss.to(self.state) for loss in (found.loss0, *found.losses)])
        panel_ops.benettin_(self.state, total, losses, self.k, **self._options)
        self._orthogonalise_again()

    def _ascend(self, found: Gradients) -> Tensor:
        """Writes every d_j; returns the Gram matrix over all groups."""
        total = None
        for part in self._groups:
            group = part.group
            for row, copy in zip(part.copies, found.copies, strict=True):
                for i, view in zip(group.positions, group.views(row), strict=True):
                    if copy[i] is None:
                        view.zero_()
            moved: dict[str, Any] = {}
            if self._options["realised"]:
                moved["theta"] = group.segments(group.tensors)
            if part.p is not None:
                moved.update(momentum=self._options["momentum"], p=part.p, p_next=part.p_next)
            gram = panel_ops.panel_ascent_(
                part.d,
                part.q,
                group.segments([found.g0[i] for i in group.positions]),
                part.copies,
                group.offsets,
                self._state_on(group.device),
                sign=self._sign,
                weight_decay=group.weight_decay,
                **moved,
            ).to(self.state.device)
            total = gram if total is None else total + gram
        return total

    def _orthogonalise_again(self) -> None:
        """The second pass of CholeskyQR, where the diagonal of R asked for it."""
        total = None
        for part in self._groups:
            state = self._state_on(part.q.device)
            transform, again = self._field("transform", state), self._field("again", state)
            panel_ops.combine_(part.d, part.d, transform, gate=again)
            if part.p_next is not None:
                panel_ops.combine_(part.p_next, part.p_next, transform, gate=again)
            gram = panel_ops.gram(part.d, part.d, gate=again).to(self.state.device)
            total = gram if total is None else total + gram
        panel_ops.benettin_refine_(self.state, total, self.k)

    # --- reading and saving ----------------------------------------------------------------------

    def _settled(self, part: _GroupPanel, now: Tensor, following: Tensor) -> Tensor:
        """The rows of a panel as the next `place` will leave them, a copy."""
        state = self._state_on(now.device)
        out = now.clone()
        panel_ops.combine_(
            out, following, self._field("transform", state), gate=self._field("pending", state)
        )
        return out

    def vectors(self) -> list[list[Tensor]]:
        """The separations, each shaped like the parameters, in their order (copies)."""
        out: list[dict[int, Tensor]] = [{} for _ in range(self.k)]  # by position
        for part in self._groups:
            for vector, row in zip(out, self._settled(part, part.q, part.d), strict=True):
                views = part.group.views(row)
                vector.update(zip(part.group.positions, views, strict=True))
        return [[vector[i] for i in range(len(vector))] for vector in out]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only; every tensor a copy."""
        state = self.state.clone()
        self._field("pending", state).zero_()
        return {
            "state": state,
            "q": [self._settled(part, part.q, part.d) for part in self._groups],
            "p": [
                None if part.p is None else self._settled(part, part.p, part.p_next)
                for part in self._groups
            ],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`; a mismatch is a ValueError, before anything changes."""
        require_entries(saved, "state", "q", "p")
        check_shapes("state", [self.state], [saved["state"]])
        check_shapes("q", [part.q for part in self._groups], saved["q"])
        check_shapes("p", [part.p for part in self._groups], saved["p"])
        self.state.copy_(saved["state"])
        for part, q, p in zip(self._groups, saved["q"], saved["p"], strict=True):
            part.q.copy_(q)
            if part.p is not None:
                part.p.copy_(p)
