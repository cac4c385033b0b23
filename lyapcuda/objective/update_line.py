"""The line from θ along an update: what an optimizer's step makes of θ, a part of it, and the
loss's slope and curvature along it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda import ops
from lyapcuda.objective.evaluator import Evaluator
from lyapcuda.objective.isolation import modules_of
from lyapcuda.params.collect import Parameters, entries_of
from lyapcuda.params.flat import FlatGroup, FlatLayout
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.shards import compute_epsilon, locals_of
from lyapcuda.params.wrapped_optimizers import loss_groups

__all__ = ["Sizes", "UpdateLine"]


@dataclass(frozen=True)
class Sizes:
    """‖U‖, and ‖θ‖ or what stands in for it where that is small; 0-dim float64 on the device."""

    update: Tensor
    theta: Tensor


class UpdateLine:
    """θ and an update U in flat buffers; whatever is computed of them stays on the device.

    Args:
        params: an optimizer, or parameters. Of the frozen ones U has no part.

    Attributes:
        layout: of the parameters that require a gradient.
        evaluator: of the same.
        parameters: those tensors, in the user's order.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([p], lr=0.1)
        >>> p.grad = torch.ones(2)
        >>> line = UpdateLine(optimizer)
        >>> line.take_step(optimizer)
        >>> line.move(torch.tensor(2.0, dtype=torch.float64))
        >>> p.data
        tensor([0.8000, 1.8000])
    """

    def __init__(self, params: Optimizer | Parameters) -> None:
        self.layout = FlatLayout(_loss_groups(params))
        self.parameters = [p.tensor for p in self.layout.parameters]
        held = list(_tensors_of(params))
        self._frozen = [p for p in held if not p.requires_grad]
        modules = modules_of(held)
        self.layout.compute_epsilon = compute_epsilon(modules)
        if self.layout.ranks is None and not self.layout.sharded:
            self.layout.ranks = Ranks.of_replicas(None, modules)
        names = [p.name for p in self.layout.parameters]
        self.evaluator = Evaluator(self.parameters, names, modules)
        self._kinds = _kinds(self.parameters)
        self._theta = [group.new_buffer(group.dtype) for group in self.layout.groups]
        self._updates = [group.new_buffer() for group in self.layout.groups]

    def is_behind(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether other parameters require a gradient, or are of another kind."""
        trainable: dict[int, Tensor] = {}
        for group in param_groups:
            trainable.update((id(p), p) for p in group["params"] if p.requires_grad)
        return _kinds(list(trainable.values())) != self._kinds

    # --- U ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def keep(self) -> None:
        """Puts θ aside."""
        torch._foreach_copy_(self.layout.views(self._theta), list(locals_of(self.parameters)))

    @torch.no_grad()
    def put_back(self) -> None:
        """The parameters are what was put aside."""
        torch._foreach_copy_(list(locals_of(self.parameters)), self.layout.views(self._theta))

    @torch.no_grad()
    def take_step(self, optimizer: Optimizer) -> None:
        """Has an optimizer take its step from what is in ``.grad``: θ is put aside, and U is what
        the step does to it. After an exception of the step's the parameters are at θ.
        """
        self.keep()
        try:
            with self._frozen_hidden():
                optimizer.step()
            for group, theta, update in self._each():
                one = update.new_ones(1, dtype=torch.float64)
                there, here = group.segments(group.tensors), _segments(group, theta)
                ops.difference_(update, there, here, group.offsets, one)
        except BaseException:
            self.put_back()
            raise

    @contextmanager
    def _frozen_hidden(self) -> Iterator[None]:
        """Inside, parameters that are frozen have no gradient: they stay."""
        held = [(p, p.grad) for p in self._frozen if p.grad is not None]
        for p, _ in held:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in held:
                p.grad = gradient

    @torch.no_grad()
    def take(self, direction: Sequence[Tensor]) -> None:
        """θ is put aside, and U is ``direction``: whole tensors like the parameters."""
        self.keep()
        self.layout.pack_(self._updates, direction)

    @torch.no_grad()
    def move(self, times: Tensor, shares: Sequence[float | Tensor] = ()) -> None:
        """The parameters are θ + times·U; which is put aside as the new θ.

        Args:
            times: 0-dim float64, on the device.
            shares: one for each of the user's groups, in ``times``; none for 1.
        """
        for group, theta, update in self._each():
            step = times.to(group.device)
            step = (step * shares[group.number]).double() if shares else step
            here = _segments(group, theta)
            ops.displace_(here, update, here, group.offsets, step.reshape(1))
        self.put_back()

    # --- along it --------------------------------------------------------------------------------

    def _each(self) -> Iterator[tuple[FlatGroup, Tensor, Tensor]]:
        return zip(self.layout.groups, self._theta, self._updates, strict=True)

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Over the groups, and the ranks that share them."""
        return self.layout.reduce(sum(part.to(self.layout.device) for part in parts))

    @torch.no_grad()
    def sizes(self) -> Sizes:
        """Of U and θ."""
        parts = []
        for _, theta, update in self._each():
            square = ops.gram(update[None], update[None]).reshape(1)
            norm = torch.linalg.vector_norm(theta, dtype=torch.float64)
            parts.append(torch.cat([square, norm.square().reshape(1)]))
        update, theta = self._sum(parts).sqrt().unbind()
        return Sizes(update, theta.clamp_min(1e-2 * math.sqrt(self.layout.numel)))

    @torch.no_grad()
    def displaced(self, step: Tensor) -> tuple[list[Tensor], Tensor]:
        """θ + step·U as tensors like the parameters (θ where ``step`` isn't finite), and
        Σ U·(what the parameters' dtype made of the displacement).
        """
        step = torch.where(step.isfinite(), step, 0.0).reshape(1)
        copies, moved = [], []
        for group, theta, update in self._each():
            copy = group.new_buffer(group.dtype)
            segments = (_segments(group, copy), update, _segments(group, theta))
            sums = ops.displace_(*segments, group.offsets, step.to(group.device))
            copies.append(copy)
            moved.append(sums[0])
        return self.layout.views(copies), self._sum(moved)

    @torch.no_grad()
    def products(self, g0: Sequence[Tensor | None], g1: Sequence[Tensor | None]) -> Tensor:
        """Of the gradients at θ and at a copy: the slope along U, the change of the gradient along
        U, Σ U², and U·HU of what weight decay adds to the loss; float64 (4,).
        """
        parts = []
        for group, theta, update in self._each():
            ends = (group.segments(group.own(gradients)) for gradients in (g0, g1))
            found = ops.directional_products(update, *ends, group.offsets)
            decay = group.weight_decay
            if decay:
                here = _segments(group, theta)
                along = ops.directional_products(update, here, here, group.offsets)[0]
                found[0] += decay * along
            parts.append(torch.cat([found, decay * found[2:]]))
        return self._sum(parts)


def _loss_groups(params: Any) -> Any:
    if not isinstance(params, Optimizer):
        return params
    try:
        return loss_groups(params)
    except ValueError:  # its decay is part of U; whether of the loss too, nobody can tell
        return [{**group, "weight_decay": 0.0} for group in params.param_groups]


def _tensors_of(params: Any) -> Iterator[Tensor]:
    entries = params.param_groups if isinstance(params, Optimizer) else entries_of(params)
    for entry in entries:
        members = entry["params"] if isinstance(entry, dict) else [entry]
        for member in [members] if isinstance(members, Tensor) else members:
            yield member[1] if isinstance(member, tuple) else member


def _segments(group: FlatGroup, buffer: Tensor) -> list[Tensor]:
    pairs = zip(group.offsets, group.sizes, strict=True)
    return [buffer[offset : offset + size] for offset, size in pairs]


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(id(t), t.shape, t.dtype, t.device) for t in tensors]
