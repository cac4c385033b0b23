"""Benettin's scheme for k separations: the leading k eigenvalues from k + 1 gradients a step.

All k copies take the same step; Gram–Schmidt, as CholeskyQR on the compiled ops, keeps their
separations orthogonal, and the diagonal of R holds the Lyapunov exponents (paper, App. C; for k = 1
Algorithm 1). Of the k×k projections of the Hessian on the separations come Ritz values with their
residuals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.arguments import described
from lyapcuda.basis import Basis
from lyapcuda.dynamics.options import GrowthOptions
from lyapcuda.dynamics.perturbation import chosen_perturbation
from lyapcuda.objective.evaluator import Gradients, lacks_any
from lyapcuda.params.copies import Copies
from lyapcuda.params.flat import FlatGroup, FlatLayout, squared_norm
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.saved_state import check_finite, check_shapes, require_entries
from lyapcuda.stability.metric import Metric, unscale_

__all__ = ["HOPELESS", "NOISY", "Benettin", "realised"]

#: With kinks, a share of the residual from which on further gradients lead astray: to a curvature
#: at the scale Δq, which is larger than that at θ.
HOPELESS = 0.6
#: With a metric, what is left of the bounds of ‖S·H·S‖ after a step, beside what the ops forget: by
#: the sign of the map. A rare row, whose v̂ is 0, can be a thousand times as steep for one step.
_LEFT = {1: 0.8, -1: 0.98}
#: How many times the noise of a difference counts as a residual that nothing can lower.
NOISY = 1.5


def _state_on(state: Tensor, device: torch.device) -> Tensor:
    """The scalars where a group's buffers are."""
    return state if device == state.device else state.to(device)


def realised(origin: Tensor, copy: Tensor, by: Tensor) -> Tensor:
    """What z rounding has left in a copy at θ + by·z; 0 where ``by`` is."""
    moved = copy.to(by.dtype) - origin.to(by.dtype)
    return torch.where(by != 0, moved / by, 0.0)


class _GroupPanels:
    """The panels of one group, k flat buffers each: q and d, with momentum p and the next p.

    In d lie, in turns, θ + q, the gradients there, and what the step makes of them; where products
    are exact, q (rounded to the parameters' dtype) and H·q in place of the first two. ``copies``:
    these lie there instead. ``scales``: those of a metric.
    """

    def __init__(
        self,
        group: FlatGroup,
        k: int,
        options: GrowthOptions,
        copies: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        self.group, self.scales = group, scales

        def panel(dtype: torch.dtype = group.buffer_dtype) -> Tensor:
            return torch.zeros((k, group.length), dtype=dtype, device=group.device)

        self.q, self.d = panel(), panel()
        # 16-bit gradients can't hold d: θ + q and the gradients there lie in a panel of their own.
        self._apart = panel(group.dtype) if group.rounds else copies
        self.p = panel() if options.momentum else None
        self.p_next = panel() if options.momentum else None
        self._exact = options.exact

    @property
    def copies(self) -> Tensor:
        """The panel that θ + q lies in."""
        return self.d if self._apart is None else self._apart

    def segments(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """What is to be added to q, or subtracted from what was found there, as segments: nothing
        where products are exact.
        """
        return self.group.zeros() if self._exact else self.group.segments(tensors)

    def swap(self) -> None:
        """What the step wrote becomes q and p; d and p_next are what they were."""
        self.q, self.d = self.d, self.q
        self.p, self.p_next = self.p_next, self.p


class Benettin:
    """q_1 … q_k, orthogonal and of norm Δq, and the scalars of their growth, on the device.

    A step is `place` (writes every θ + q_j), the user's k + 1 gradients, `measure` and `conclude`.
    Without the last the separations stay as they are. Memory at rest: two panels of k·N floats;
    for 16-bit parameters one more of those, with momentum two more.

    For k > 1 a step writes the next separations to q. For k = 1 the panels q and d change places
    instead, and the separation is ``transform·q``: a pass less (`lyapcuda.ops.step`).

    With an estimate from quotients (`lyapcuda.ops.OF_QUOTIENTS`) the separations are turned to the
    Ritz vectors at every step, which leaves their span alone: q_i then belongs to value i. The
    other estimates keep Benettin's own basis, whose exponents they are read from.

    With a metric P the eigenvalues are those of P⁻¹H. Separations are carried as z = P^(1/2)·q. In
    these coordinates the Hessian is S·H·S, S = P^(-1/2), so all that follows from products of
    separations stays as it is. A copy lies at θ + displacement·S·z, Δq away from θ.

    Args:
        layout: of the parameters.
        k: separations, 1 to 32.
        sign: 1 climbs, to the largest eigenvalues; −1 descends, to the smallest.
        options: of the map.
        copies: panels, one a group, in which the gradients at the copies outlast the step; None:
            they don't.
        metric: of the optimizer, up to date at every `place`; None: the Euclidean one.
    """

    def __init__(
        self,
        layout: FlatLayout,
        k: int,
        sign: int,
        options: GrowthOptions,
        copies: Sequence[Tensor | None] | None = None,
        metric: Metric | None = None,
    ) -> None:
        self.layout, self.k, self._sign, self._seed = layout, k, sign, options.seed
        self._metric = metric
        self._chosen, self.linear = options, options.exact
        # Whether `replace` was called since `place`; `first` as it would be without.
        self._refined, self._first = False, None
        rounds = any(group.rounds for group in layout.groups)
        self._options = {
            **options.of_ops(sign, rounds),
            "realised": rounds,
            "rotate": options.of_quotients,
        }
        none = [None] * len(layout.groups)
        scales = none if metric is None else metric.buffers
        self._groups = [
            _GroupPanels(group, k, options, panel, scale)
            for group, panel, scale in zip(layout.groups, copies or none, scales, strict=True)
        ]
        self._copies = Copies(layout)
        if options.exact:
            size = options.perturbation or 1.0
        else:
            size = chosen_perturbation(layout, options.perturbation)
        # β = 0 measures and orthogonalises without a step: the first one, unless β is known.
        self.state = ops.new_state(layout.device, k, perturbation=size, beta=options.first_rate)
        self._randomise(options.seed, size)

    def suit(self, smooth: bool) -> None:
        """Takes the estimate that suits the loss, unless the user chose one.

        Args:
            smooth: whether the loss is known to have no kinks.
        """
        self.linear = smooth or self._chosen.exact
        self._options["estimate"] = self._chosen.suitable(
            self._sign, self.linear, self._options["realised"]
        )

    def resize(self, size: float) -> None:
        """Takes another Δq, from the next separations on."""
        held = self._field("perturbation")
        # The step has put the transform down at the Δq of before.
        self._field("transform").mul_(size / held)
        held.fill_(size)

    def widen(self, noise: float, doubt: float) -> None:
        """Adds the noise of a gradient difference, of norm ``noise``, to the last error bar and
        error, since the residual of a noisy product isn't that of an eigenvector; and ``doubt``.
        """
        share = noise / self._field("perturbation") + doubt
        # Where nothing was accepted, the bar is that of before, and has it already.
        added = torch.where(self._field("accepted") > 0, share, 0.0)
        self._field("width").add_(added)
        self._field("error").add_(added)

    def _randomise(self, seed: int, size: float) -> None:
        """Fills every q_j with normal numbers of a generator of our own, of norm ``size``."""
        squares, displaced = [0.0] * self.k, [0.0] * self.k
        for number, part in enumerate(self._groups):
            generator = torch.Generator(part.group.device).manual_seed(seed + number)
            for j, row in enumerate(part.q):
                part.group.randomise_(row, generator)
                if part.scales is not None:  # random in θ's coordinates: z = q/S, 0 where S is
                    row.mul_(part.scales != 0)
                    displaced[j] += squared_norm(row)
                    unscale_(row, part.scales)
                squares[j] += squared_norm(row)
        total = torch.tensor([squares, displaced], dtype=torch.float64, device=self.layout.device)
        squares, displaced = self.layout.reduce(total).tolist()
        for part in self._groups:
            for row, square in zip(part.q, squares, strict=True):
                row.mul_(size / math.sqrt(square))
        if self._metric is not None:
            ratios = [math.sqrt(s / d) for s, d in zip(squares, displaced, strict=True)]
            self._field("displacement").copy_(torch.tensor(ratios, dtype=torch.float64))

    def _field(self, name: str, state: Tensor | None = None) -> Tensor:
        """One field of the state, a view."""
        return ops.state_field(self.state if state is None else state, self.k, name)

    def value(self, name: str) -> Tensor:
        """One field of the state, float64 on the device, a copy: (k,), of a scalar (1,)."""
        return self._field(name).clone()

    def restart_average(self) -> None:
        """Lets h_ema begin anew at the present h."""
        self._field("h_ema").copy_(self._field("h"))

    # --- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def place(self) -> list[list[Tensor]]:
        """Writes every θ + q_j, for exact products every q_j; returns them, each in the order of
        `FlatLayout.parameters`.
        """
        for part in self._groups:
            part.group.check()
        self._refined = False
        for part in self._groups:
            group = part.group
            ops.recenter_(
                part.q,
                part.copies,
                part.d,
                part.segments(group.tensors),
                group.offsets,
                _state_on(self.state, group.device),
                p=part.p,
                p_next=part.p_next,
                metric=part.scales,
            )
        self._settle(self.state)
        return [list(copy) for copy in self._views()]

    def _settle(self, state: Tensor) -> None:
        """Puts down that the separations are whole in q, and stay so until the next `conclude`."""
        self._field("pending", state).fill_(1.0 if self.k == 1 else 0.0)

    def _views(self) -> list[list[Tensor]]:
        return self._copies.of([part.copies for part in self._groups])

    @property
    def sums(self) -> int:
        """Numbers that `measure` returns."""
        blocks = 2 + self._options["realised"] + bool(self._options["momentum"])
        return (blocks**2 + (self._metric is not None)) * self.k**2

    @torch.no_grad()
    def measure(self, found: Gradients) -> Tensor:
        """Steps all copies along their gradients, to every d_j; returns the products over this
        rank's elements: the Gram matrix, and with a metric that of the S·d_j, one after the other.

        Args:
            found: the gradients at the copies, or the exact products, where `place` wrote those.
        """
        for gradients, copy in zip(found.copies, self._views(), strict=True):
            if lacks_any(gradients):
                pairs = zip(gradients, copy, strict=True)
                torch._foreach_zero_([view for gradient, view in pairs if gradient is None])
        total = None
        for part in self._groups:
            group = part.group
            moved: dict[str, Any] = {}
            if self._options["realised"]:
                moved["theta"] = part.segments(group.tensors)
            if part.p is not None:
                moved.update(momentum=self._options["momentum"], p=part.p, p_next=part.p_next)
            gram = ops.ascent_(
                part.d,
                part.q,
                part.segments(group.own(found.g0)),
                part.copies,
                group.offsets,
                _state_on(self.state, group.device),
                sign=self._sign,
                weight_decay=group.weight_decay,
                metric=part.scales,
                **moved,
            )
            products = gram.reshape(-1)
            if part.scales is not None:
                displaced = ops.gram(part.d, part.d, weights=part.scales)
                products = torch.cat([products, displaced.reshape(-1)])
            products = products.to(self.state.device)
            total = products if total is None else total + products
        return total

    def _step_of(self, state: Tensor, products: Tensor, losses: Tensor) -> None:
        """Has `benettin_` take the products of `measure`, over all elements, into a state."""
        own = self.k**2 if self._metric is not None else 0
        gram, displaced = products.split([len(products) - own, own])
        rows = math.isqrt(len(gram))
        ops.benettin_(
            state,
            gram.view(rows, rows),
            losses,
            self.k,
            displaced=displaced.view(self.k, self.k) if own else None,
            **self._options,
        )

    def conclude(self, products: Tensor, losses: Tensor, coarse: bool = False) -> None:
        """Takes the growth, by what `measure` found over all elements, into the state.

        ``coarse``: the arithmetic asks for so large a Δq that each side of θ is some percent off,
        as for 16-bit parameters. Half of what two sides differ by then counts as error too.
        """
        before = None
        bends = self._chosen.one_sided and (coarse or self._options["realised"])
        center = self.value("center") if bends else None
        if self._chosen.tolerance is not None:
            before = {name: self.value(name) for name in ("refined", "first")}
            self._field("refined").fill_(float(self._refined))
            if self._refined:
                self._field("first").copy_(self._first)
        self._step_of(self.state, products, losses)
        if self._metric is not None:
            for name in ("bound", "guard"):
                self._field(name).mul_(_LEFT[self._sign])
        for name, value in (before or {}).items():  # of what wasn't accepted, nothing stays
            field = self._field(name)
            field.copy_(torch.where(self._field("accepted") > 0, field, value))
        if center is not None:
            apart = 0.5 * (self._field("center") - center).abs()
            self._field("error").add_(torch.where(apart.isfinite(), apart, 0.0))
        if self.k == 1:
            for part in self._groups:
                part.swap()
        else:
            self._refine()
        layout = self.layout
        for part, seed in zip(self._groups, layout.seeds(self._seed), strict=True):
            group = part.group
            kept, p = (part.d, part.p_next) if self.k == 1 else (part.q, part.p)
            state = _state_on(self.state, group.device)
            ops.reseed_(
                kept, group.offsets, group.sizes, state, elements=layout.numel, seed=seed, p=p
            )

    def _refine(self) -> None:
        """The second pass of CholeskyQR, where the diagonal of R asked for it."""
        ranks = self.layout.ranks
        # Where it can be read back anyway: an exchange less.
        skip = ranks is not None and ranks.reads_back(self.state.device)
        if not skip or self._field("again"):
            ops.benettin_refine_(self.state, self.layout.reduce(self._second_gram()), self.k)

    # --- in a larger span (`lyapcuda.dynamics.refinement`) ---------------------------------------

    @property
    def gradients(self) -> list[list[Tensor]]:
        """Those at the copies, where they were, after `measure`; with ``copies`` of the user's."""
        return self._views()

    def unsettled(self, products: Tensor, losses: Tensor, tol: float, noise: float) -> Tensor:
        """Whether `conclude` would accept the step; and whether it would leave a residual above
        tol·|h|, and further gradients may help. (2,) bool on the device.

        Args:
            products, losses: as for `conclude`.
            tol: of `lyapcuda.dynamics.options.Tolerance`.
            noise: of a gradient difference, its norm.
        """
        state = self.state.clone()
        self._field("refined", state).zero_()
        self._step_of(state, products, losses)
        h, residual = self._field("h", state), self._field("residual", state)
        self._first = self._field("first", state)
        large = residual > torch.hypot(tol * h, NOISY * noise / self._field("perturbation"))
        if not self.linear:
            large = large & (self._first < HOPELESS)
        return torch.stack([(self._field("accepted", state) > 0).squeeze(), large.any()])

    def export(self, vectors: Basis, size: Tensor) -> None:
        """Writes what the gradients' differences belong to, over Δq, to k rows."""
        for part, rows in zip(self._groups, vectors.panels, strict=True):
            group = part.group
            state, here = _state_on(self.state, group.device), size.to(group.device).squeeze()
            times = self._field("transform", state).squeeze() if self.k == 1 else 1.0
            if not group.rounds:
                # In two steps, as a saved state has the separations times the transform.
                torch.mul(part.q, times, out=rows).div_(here)
                continue
            theta = part.segments(group.tensors)
            displacements = self._field("displacement", state)
            for q, row, displacement in zip(part.q, rows, displacements, strict=True):
                for origin, offset in zip(theta, group.offsets, strict=True):
                    span = slice(offset, offset + origin.numel())
                    by = displacement.to(q.dtype)
                    by = by if part.scales is None else part.scales[span] * by
                    wide, z = origin.reshape(-1), q[span] * times
                    copy = (wide.to(q.dtype) + z * by).to(group.dtype)
                    row[span] = realised(wide, copy, by) / here

    @torch.no_grad()
    def replace(
        self,
        vectors: Basis,
        products: Basis,
        mix: Tensor,
        vv: Tensor,
        vy: Tensor,
        yy: Tensor,
    ) -> Tensor:
        """Goes on from other separations, between `measure` and `conclude`.

        Args:
            vectors, products: k rows q and y each.
            mix: (k, k), float64, what the new separations have of the ones before: their momenta
                have as much.
            vv, vy, yy: the rows' products with each other, over all elements.

        Returns:
            The products for `conclude`.
        """
        device, momentum = self.state.device, float(self._options["momentum"])
        for part, q, y in zip(self._groups, vectors.panels, products.panels, strict=True):
            state = _state_on(self.state, part.group.device)
            part.q.copy_(q)
            moved = y
            if part.p is not None:
                if self.k == 1:
                    part.p.mul_(self._field("transform", state).squeeze())
                ops.combine_(part.p, part.p, mix.to(state.device).contiguous())
                moved = torch.add(y, part.p, alpha=momentum, out=part.p_next)
            rate = (self._sign * self._field("beta", state)).squeeze()
            torch.mul(moved, rate, out=part.d)
            part.d.add_(part.q)
        if self.k == 1:
            self._field("transform").fill_(1.0)  # it is in q and p
        self._refined = True
        blocks = [0, 1, 0] if self._options["realised"] else [0, 1]
        sums = {(0, 0): vv, (0, 1): vy, (1, 0): vy.T, (1, 1): yy}
        gram = torch.cat([torch.cat([sums[i, j] for j in blocks], 1) for i in blocks])
        if not momentum and self._metric is None:
            return gram.reshape(-1)
        # Of d, or of S·d.
        parts = [ops.gram(part.d, part.d, weights=part.scales).to(device) for part in self._groups]
        stepped = self.layout.reduce(torch.stack(parts).sum(0))
        if momentum:
            return torch.block_diag(gram, stepped).reshape(-1)
        return torch.cat([gram.reshape(-1), stepped.reshape(-1)])

    def excuse(self) -> None:
        """What the other ranks exchange in `conclude`, on one whose closure raised."""
        if self.k > 1:
            self.layout.reduce(self.state.new_zeros(self.k, self.k))

    def _second_gram(self) -> Tensor:
        """Applies the transform where a second pass is asked for; returns the Gram matrix over this
        rank's elements.
        """
        total = None
        for part in self._groups:
            state = _state_on(self.state, part.q.device)
            transform, again = self._field("transform", state), self._field("again", state)
            ops.combine_(part.d, part.d, transform, gate=again)
            if part.p_next is not None:
                ops.combine_(part.p_next, part.p_next, transform, gate=again)
            gram = ops.gram(part.d, part.d, gate=again).to(self.state.device)
            total = gram if total is None else total + gram
        return total

    @property
    def stepped(self) -> list[Tensor]:
        """What the last step wrote to the d of every group, (k, n): while the state says that a
        transform is pending, the next separations are combinations of its rows.
        """
        return [part.q if self.k == 1 else part.d for part in self._groups]

    # --- reading and saving ----------------------------------------------------------------------

    @property
    def displacements(self) -> Tensor:
        """What S·z is multiplied with in every copy, (k,); 1 without a metric."""
        return self.value("displacement")

    def _settled(self, now: Tensor, following: Tensor) -> Tensor:
        """A group's separations as the next `place` will leave them, or their momenta, a copy."""
        state = _state_on(self.state, now.device)
        transform, pending = self._field("transform", state), self._field("pending", state)
        if self.k == 1:
            return torch.where(pending != 0, now, following) * transform.squeeze()
        out = now.clone()
        ops.combine_(out, following, transform, gate=pending)
        return out

    def _separations(self) -> list[Tensor]:
        """A panel a group (copies)."""
        return [self._settled(part.q, part.d) for part in self._groups]

    def vectors(self) -> list[list[Tensor]]:
        """The separations, each shaped like the parameters, in their order (copies)."""
        panels = self._separations()
        for part, panel in zip(self._groups, panels, strict=True):
            if part.scales is not None:
                panel.mul_(part.scales).mul_(self.displacements.to(panel)[:, None])
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
        self._settle(state)
        if self.k == 1:
            self._field("transform", state).fill_(1.0)  # it is in q and p
        momenta = [
            self._settled(part.p, part.p_next) for part in self._groups if part.p is not None
        ]
        return {
            "state": state,
            "linear": self.linear,
            "q": self.layout.unpack(self._separations()),
            "p": self.layout.unpack(momenta) if momenta else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`; a mismatch is a ValueError, before anything changes."""
        require_entries(saved, "state", "linear", "q", "p")
        if not isinstance(saved["linear"], bool):
            raise ValueError(f"state_dict: linear is {described(saved['linear'])}, expected a bool")
        check_shapes("state", [self.state], [saved["state"]])
        momenta = [part.p for part in self._groups if part.p is not None]
        check_shapes("q", self.layout.unpack([part.q for part in self._groups]), saved["q"])
        saved_p = [] if saved["p"] is None else saved["p"]
        check_shapes("p", self.layout.unpack(momenta) if momenta else [], saved_p)
        check_finite("q", saved["q"])
        check_finite("p", saved_p)
        names = ("perturbation", "beta", "transform")
        check_finite("state", [self._field(name, saved["state"]) for name in names])
        self.suit(saved["linear"])
        self.state.copy_(saved["state"])
        self._settle(self.state)
        self.layout.pack_([part.q for part in self._groups], saved["q"])
        if momenta:
            self.layout.pack_(momenta, saved_p)
