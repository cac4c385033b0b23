"""Products of a Hessian and vectors, by differences of gradients and by double backward.

Vectors are one flat buffer a group of parameters. Everything here is told how to measure;
`lyapcuda.solvers.operator` chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lyapcuda import ops
from lyapcuda.basis import Basis
from lyapcuda.dynamics.perturbation import Extent, active_sums
from lyapcuda.objective.evaluator import check_same
from lyapcuda.objective.fixed_objective import FixedObjective
from lyapcuda.objective.loss_graph import (
    Sighting,
    has_kinks,
    loss_epsilon,
    unproven,
    watching,
)
from lyapcuda.objective.same_function import ADVICE, Fingerprint
from lyapcuda.params.flat import FlatGroup, FlatLayout
from lyapcuda.stability.metric import unscale_

__all__ = ["Buffers", "Products", "displace"]

#: Flat buffers, one a group.
Buffers = Sequence[Tensor]


class _GroupBuffers:
    """What one group needs beside v and Hv: where to evaluate, and the gradient to subtract."""

    def __init__(self, group: FlatGroup, streams: bool) -> None:
        self.group = group
        # A gradient that is added up over batches can't lie where its θ + q does.
        apart = streams or group.rounds
        self.copies = group.new_buffer(group.dtype) if apart else None
        self.minus = group.new_buffer(None if streams else group.dtype)
        self._minus_copies = None if streams else self.minus

    @property
    def minus_copies(self) -> Tensor:
        """Where θ − q lies, for central differences."""
        if self._minus_copies is None:
            self._minus_copies = self.group.new_buffer(self.group.dtype)
        return self._minus_copies


def displace(layout: FlatLayout, copies: Buffers, vectors: Buffers, step: Tensor) -> Tensor:
    """Writes θ + step·v to ``copies``, in the parameters' types.

    Args:
        layout: of the parameters, whose values are θ.
        copies, vectors: one flat buffer a group.
        step: 0-dim float64.

    Returns:
        (2,) float64: the displacement that was realised times v, and v·v.
    """
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for group, where, v in zip(layout.groups, copies, vectors, strict=True):
        sums = ops.displace_(
            group.segments(group.views(where)),
            v,
            group.segments(group.tensors),
            group.offsets,
            step.to(v.device),
        )
        total += sums.to(total.device)
    return total


class Products:
    """Products with the Hessian of one objective, and what has been seen of its loss so far.

    With a ``scale`` S these are products with S·H·S: the Hessian by z, where θ + S·z is where the
    loss is taken. Vectors are displacements of z then.

    Args:
        layout, objective: the parameters, and the loss as one fixed function of them.
        debug: that it isn't is a RuntimeError.
        scale: S, a flat buffer a group; None where it is 1.

    Attributes:
        gradient_evaluations: so far; an exact product counts as two.
        epsilon: machine epsilon of the coarsest type that the loss is computed in (16 bits under
            autocast, or TF32), as far as autograd's graph shows it, and at least the parameters'.
        kinks_named: whether the graph shows a function whose derivative jumps; None before g(θ).
        jumps: whether the gradient was seen to jump beside θ; None before that was looked at.
        wrong, custom: names of functions in the loss whose double backward is known to be wrong,
            and not known to be right.
        loss: at θ, 0-dim; None before g(θ).
        extent: of the parameters that get a gradient; None before g(θ).
        changed: how two evaluations at one θ differed, in words; None where they didn't.
    """

    def __init__(
        self,
        layout: FlatLayout,
        objective: FixedObjective,
        debug: bool = False,
        scale: Buffers | None = None,
    ) -> None:
        self.layout, self.objective, self.debug = layout, objective, debug
        self._scale = scale
        self.gradient_evaluations = 0
        self.epsilon = layout.epsilon()
        self.kinks_named: bool | None = None
        self.jumps: bool | None = None
        self.wrong: str | None = None
        self.custom: str | None = None
        self.loss: Tensor | None = None
        self.extent: Extent | None = None
        self.changed: str | None = None
        #: None before the first difference.
        self._buffers: list[_GroupBuffers] = []
        #: g(θ), in the order of the parameters; views of the buffers.
        self._origin: list[Tensor] = []
        self._holds_gradient = False
        #: Of the first evaluation at the present θ, and the parameters' versions then.
        self._first: Fingerprint | None = None
        #: ‖S·g‖² there.
        self._square: Tensor | None = None
        self._versions: list[int] | None = None
        self._seen_twice = False
        self._unit = torch.tensor([1.0, 0.0], dtype=torch.float64, device=layout.device)

    # --- at θ ------------------------------------------------------------------------------------

    def gradient(self) -> list[Tensor]:
        """Returns g(θ), one flat buffer a group (live: a central difference writes there).

        Evaluated twice at first, to see that the loss is one function; then again where the
        parameters, or the buffers, have been written to since.
        """
        self.look(gradient=True)
        return [part.minus for part in self._buffers]

    def look(self, gradient: bool = False) -> None:
        """Evaluates g(θ), unless it was seen at this θ already (and isn't asked for)."""
        self._follow()
        if self._first is not None and self._seen_twice and not gradient:
            return
        self._make_buffers()
        if self._holds_gradient and self._seen_twice:
            return
        points: list[Any] = [] if self._holds_gradient else [(None, self._origin)]
        if not self._seen_twice and self._first is None:
            points.append((None, self._compare))
        for point in points:
            sighting = Sighting()
            # A closure that calls backward() itself may return no more than a number.
            with watching(sighting) if self._first is None else nullcontext():
                loss = self.objective.gradients_at([point], closure=self._watched)[0]
            self.epsilon = max(self.epsilon, sighting.epsilon)
            self.gradient_evaluations += 1
            if point[1] is self._origin:
                self._compare(self._origin, loss)
                self._holds_gradient = True

    def start(self, out: Buffers, exact: bool) -> None:
        """Writes S·g(θ) to flat buffers; for exact products, out of the graph that they need."""
        if not exact or not self.objective.is_one_batch:
            for buffer, part in zip(out, self.gradient(), strict=True):
                buffer.copy_(part)
            self.scale_(out)
            return
        self._follow()
        views = self.layout.views(out)

        def take(gradients: Sequence[Tensor | None]) -> None:
            for view, gradient in zip(views, gradients, strict=True):
                view.zero_() if gradient is None else view.copy_(gradient)

        loss = self.objective.graph_gradient(take, closure=self._watched)
        self._compare(views, loss)
        self.scale_(out)

    def check_unchanged(self) -> None:
        """Evaluates g(θ) once more; RuntimeError where it isn't what it was (``debug=True``)."""
        self._follow()
        for _ in range(2 if self._first is None else 1):
            self.objective.gradients_at([(None, self._check)], closure=self._watched)
            self.gradient_evaluations += 1

    def _check(self, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        if self._first is None:
            self._compare(gradients, loss)
        else:
            check_same(self._first, Fingerprint.of(loss, self._filled(gradients)))

    def is_really_changed(self) -> bool:
        """Whether two runs of backward() at θ differ too, not only one and the graph of exact
        products; for two gradients.
        """
        self.forget()
        self.look(gradient=True)
        return self.changed is not None

    def forget(self) -> None:
        """Forgets what was seen at this θ."""
        self._first, self.changed = None, None
        self._holds_gradient = self._seen_twice = False

    def _follow(self) -> None:
        """Forgets what was seen at another θ."""
        versions = [p._version for p in self.objective.evaluator.parameters]
        if versions != self._versions:
            self._versions, self._first = versions, None
            self._holds_gradient = self._seen_twice = False

    def _compare(self, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        """Takes note of an evaluation at θ, and of how it differs from the one before."""
        filled = self._filled(gradients)
        now = Fingerprint.of(loss, filled)
        if self._first is None:
            self._first, self.loss = now, loss
            self._square = now.square if self._scale is None else self._scaled_square(filled)
            theta = [p.detach() for p in self.objective.evaluator.parameters]
            self.extent = Extent.of(
                self.layout, *map(float, active_sums(theta, filled, self.layout.device))
            )
            return
        self._seen_twice = True
        difference = self._first.differs(now, self.epsilon)
        if difference is not None and self.changed is None:
            self.changed = f"two evaluations at the same θ gave {difference}: {ADVICE}"
            if self.debug:
                raise RuntimeError(f"closure: {self.changed}")

    def _filled(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """With zeros where a parameter gets no gradient."""
        pairs = zip(gradients, self.objective.evaluator.parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _scaled_square(self, gradients: Sequence[Tensor]) -> Tensor:
        """‖S·g‖², 0-dim float64."""
        pairs = zip(self.layout.views(self._scale), gradients, strict=True)
        device = self.layout.device
        return sum(
            torch.linalg.vector_norm(s * g, dtype=torch.float64).square().to(device)
            for s, g in pairs
        )

    def _watched(self, *batch: Any) -> Tensor | float:
        loss = self.objective.closure(*batch)
        if self.kinks_named is None:
            self.kinks_named = has_kinks(loss)
            self.epsilon = max(self.epsilon, loss_epsilon(loss))
            self.wrong, self.custom = unproven(loss)
        return loss

    def _make_buffers(self) -> None:
        if not self._buffers:
            streams = self.objective.batches is not None
            self._buffers = [_GroupBuffers(group, streams) for group in self.layout.groups]
            self._origin = self.layout.views([part.minus for part in self._buffers])

    def release(self) -> None:
        """Frees the buffers and g(θ), which the next product would make anew."""
        self._buffers, self._origin, self._holds_gradient = [], [], False

    @property
    def rounding(self) -> float:
        """About the norm of the rounding errors of S·g(θ). Waits for the device."""
        return 0.0 if self._first is None else self.epsilon * math.sqrt(float(self._square))

    def losses_along_gradient(self, size: float) -> tuple[float, float, float]:
        """What the loss changes by from θ − Δ to θ + Δ along z = S·g(θ), and what the gradient
        says it does: twice the displacement of z times ‖S·g‖. For two forward passes; g(θ) has to
        be there.

        Args:
            size: the norm of Δ.

        Returns:
            Both, and the norm of the displacement of z.
        """
        norm = math.sqrt(float(self._square))
        if norm == 0.0:
            return 0.0, 0.0, 0.0
        along = self.scaled([part.minus.to(part.group.buffer_dtype) for part in self._buffers])
        length = float(self.length_of(along, torch.full_like(self._unit[0], norm)))
        direction = self.scaled(along)
        copies = [part.group.new_buffer(part.group.dtype) for part in self._buffers]
        losses = []
        for side in (size, -size):
            step = torch.full((), side / length, dtype=torch.float64, device=self.layout.device)
            displace(self.layout, copies, direction, step)
            losses.append(float(self.objective.loss_at(self.layout.views(copies))))
        moved = size * (norm / length)
        return losses[0] - losses[1], 2.0 * moved * norm, moved

    # --- the scale -------------------------------------------------------------------------------

    def scaled(self, vectors: Buffers) -> Buffers:
        """S·v; v itself where S is 1."""
        if self._scale is None:
            return vectors
        return [s * v for s, v in zip(self._scale, vectors, strict=True)]

    def scale_(self, vectors: Buffers) -> None:
        """v ← S·v."""
        if self._scale is not None:
            for s, v in zip(self._scale, vectors, strict=True):
                v.mul_(s)

    def unscale_(self, vectors: Buffers) -> None:
        """v ← v/S; 0 where S is."""
        if self._scale is not None:
            for s, v in zip(self._scale, vectors, strict=True):
                unscale_(v, s)

    @property
    def is_scaled(self) -> bool:
        """Whether S is anything but 1."""
        return self._scale is not None

    def length_of(self, vectors: Buffers, norm: Tensor) -> Tensor:
        """‖S·v‖: how far θ moves where z moves by v; 0-dim float64.

        Args:
            vectors: v.
            norm: ‖v‖, which it is where S is 1.
        """
        if self._scale is None:
            return norm
        row = Basis(self.layout, [v[None] for v in vectors])
        return row.gram(row, self._scale)[0, 0].sqrt()

    # --- products --------------------------------------------------------------------------------

    def difference(
        self, vectors: Buffers, out: Buffers, step: Tensor, length: float, central: bool
    ) -> Tensor:
        """Writes Hv/length by a difference of gradients, divided by the displacement realised.

        Args:
            vectors, out: v and where the product goes; not the same memory.
            step: θ + step·S·v (central: and θ − step·S·v) is where gradients are evaluated; 0-dim
                float64.
            length: ‖v‖, or 1 to divide by nothing.

        Returns:
            The loss at the last evaluation, 0-dim.
        """
        objective, vectors = self.objective, self.scaled(vectors)
        if central:
            self.look()
            self._make_buffers()
        else:
            self.gradient()
        copies = [
            buffer if part.copies is None else part.copies
            for part, buffer in zip(self._buffers, out, strict=True)
        ]
        sums = displace(self.layout, copies, vectors, step)
        minus: Sequence[Tensor | None] = self._origin
        if central:
            self._holds_gradient = False
            others = [part.minus_copies for part in self._buffers]
            sums = sums - displace(self.layout, others, vectors, -step) * self._unit
            minus = self.layout.views([part.minus for part in self._buffers])
        # Divided by what was realised along v; 0 for v = 0.
        moved = sums[0] * length
        scale = torch.where(sums[1] > 0, sums[1] / moved, 0.0)

        def divided(plus: Sequence[Tensor | None], minus: Sequence[Tensor | None]) -> None:
            for group, v, y in zip(self.layout.groups, vectors, out, strict=True):
                decay = group.weight_decay
                ops.difference_(
                    y,
                    group.segments(group.own(plus)),
                    group.segments(group.own(minus)),
                    group.offsets,
                    scale.to(y.device),
                    weight_decay=decay / length if decay else 0.0,
                    v=v if decay else None,
                )

        if objective.batches is None:
            # The last gradient is taken where it lies.
            plus = self.layout.views(copies)
            if central:
                points = [(plus, plus), (minus, lambda found, loss: divided(plus, found))]
            else:
                points = [(plus, lambda found, loss: divided(found, minus))]
        else:
            plus = self.layout.views(out)
            points = [(self.layout.views(copies), plus)]
            if central:
                points.append((self.layout.views(others), minus))
        losses = objective.gradients_at(points)
        if objective.batches is not None:
            divided(plus, minus)
        self.scale_(out)
        self.gradient_evaluations += len(points)
        return losses[-1]

    def exact(self, vectors: Sequence[Buffers], out: Sequence[Buffers], length: float) -> Tensor:
        """Writes Hv/length of each of several vectors, by double backward.

        Returns:
            The loss, 0-dim.

        Raises:
            DoubleBackwardError: something in the loss has no second derivative in torch.
        """
        parameters = self.objective.evaluator.parameters
        vectors = [self.scaled(v) for v in vectors]
        pieces = [
            [view.to(p.dtype) for view, p in zip(self.layout.views(v), parameters, strict=True)]
            for v in vectors
        ]
        totals = [self.layout.views(y) for y in out]
        loss = self.objective.hessian_products(pieces, totals, closure=self._watched)
        self.gradient_evaluations += 2 * len(vectors)
        for v, y in zip(vectors, out, strict=True):
            for group, factor, product in zip(self.layout.groups, v, y, strict=True):
                if group.weight_decay:
                    product.add_(factor, alpha=group.weight_decay)
                if length != 1.0:
                    product.mul_(1.0 / length)
            self.scale_(y)
        return loss
