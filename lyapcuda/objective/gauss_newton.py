"""Gauss-Newton products Jᵀ·M·J·v of a loss ℓ(f(θ)): J is the Jacobian of the outputs f, and M the
Hessian of ℓ, or 1/n.

J·v comes from double backward, or from a difference of two forward passes; Jᵀ from one backward
pass. M needs second derivatives of ℓ alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lyapcuda.arguments import described
from lyapcuda.objective.double_backward import (
    held_bytes,
    loss_to_differentiate,
    receive,
    twice,
)

__all__ = ["Direction", "GaussNewtonGraph", "OutputsAndLoss"]


class OutputsAndLoss:
    """ℓ(f(batch), batch) as one closure, which remembers the outputs f of its last call.

    Args:
        outputs: f: takes nothing, or a batch; returns a tensor, or a tuple, a dict and the like.
        loss: ℓ: of the outputs, and of the batch where there is one. None: the outputs are losses,
            one a sample, and ℓ is their mean.
    """

    def __init__(
        self, outputs: Callable[..., Any], loss: Callable[..., Tensor] | None = None
    ) -> None:
        self._outputs, self._loss = outputs, loss
        self._batch: tuple[Any, ...] = ()
        self._last: list[Tensor] = []

    def __call__(self, *batch: Any) -> Tensor:
        """The loss. Raises a TypeError or ValueError for outputs that aren't any."""
        found = self._outputs(*batch)
        self._batch, self._last = batch, _tensors(found)
        if self._loss is not None:
            return self._loss(found, *batch)
        if not isinstance(found, Tensor) or found.dim() == 0:
            raise ValueError(
                f"losses: expected a tensor of one loss a sample, got {described(found)}; as of "
                "cross_entropy(..., reduction='none')"
            )
        return found.mean()

    def take(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """The outputs of the last call that depend on something, and its batch; lets go of both."""
        found = [tensor for tensor in self._last if tensor.requires_grad], self._batch
        self._last, self._batch = [], ()
        return found

    def again(self, batch: tuple[Any, ...]) -> list[Tensor]:
        """The outputs alone, all of them, without autograd's graph."""
        with torch.no_grad():
            return _tensors(self._outputs(*batch))

    @property
    def is_of_samples(self) -> bool:
        """Whether the outputs are losses, one a sample."""
        return self._loss is None


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors that outputs consist of."""
    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.dtype.is_floating_point]


@dataclass(frozen=True)
class Direction:
    """v, as a product needs it.

    Attributes:
        parts: v, shaped like the parameters and of their types.
        sides: θ + h·v and θ − h·v, where J·v is a difference; None for double backward.
        scale: 1/(2h), of the displacement that was realised; 0-dim.
    """

    parts: Sequence[Tensor]
    sides: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
    scale: Tensor | None = None


class GaussNewtonGraph:
    """Autograd's graph of a loss through its outputs, from which products are taken.

    Has what `lyapcuda.objective.double_backward.GradientGraph` has.

    Args:
        closure: returns the loss; calls ``pair`` once.
        pair: the closure's own two parts.
        parameters: leaf tensors.
        at: gives a context in which the parameters are others, from the random states that the
            closure began with.
        look: handed the loss.

    Attributes:
        loss: 0-dim, detached.
        versions: of the parameters then.

    Raises:
        DoubleBackwardError: the closure called ``backward()``, or its loss has no graph.
        ValueError: no outputs that depend on the parameters.
    """

    def __init__(
        self,
        closure: Callable[[], Tensor],
        pair: OutputsAndLoss,
        parameters: Sequence[Tensor],
        at: Callable[[Sequence[Tensor]], Any],
        look: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self._pair, self._parameters, self._at = pair, parameters, at
        with loss_to_differentiate(closure, parameters) as loss:
            if look is not None:
                look(loss)
            self._outputs, self._batch = pair.take()
            if not self._outputs:
                raise ValueError("outputs: none of them depends on the parameters")
            self._slopes: Sequence[Tensor | None] = ()
            if not pair.is_of_samples:
                with twice("the loss of the outputs"):
                    self._slopes = torch.autograd.grad(
                        loss, self._outputs, create_graph=True, allow_unused=True
                    )
        self.loss = loss.detach().reshape(())
        self.versions = [p._version for p in parameters]
        #: Jᵀw, and the w that it is linear in; made where double backward first needs it.
        self._transposed: tuple[list[Tensor], Sequence[Tensor | None]] | None = None

    def held_bytes(self) -> int:
        """How much memory it holds, as far as that shows."""
        return held_bytes([tensor.grad_fn for tensor in self._outputs])

    def product(
        self,
        vector: Direction,
        total: Sequence[Tensor],
        *,
        keep: bool,
        weight: float | None = None,
    ) -> None:
        """Writes the product to ``total``; with a ``weight``, adds so many times it.

        Args:
            vector: v.
            total: of the parameters' shapes.
            keep: the graph stays, for further products.

        Raises:
            DoubleBackwardError: a function in the outputs (or, in the loss of the outputs) has no
                second derivative in torch.
        """
        moved = self._along(vector)
        pairs = [
            (output, pulled)
            for output, pulled in zip(self._outputs, self._curved(moved), strict=True)
            if pulled is not None
        ]
        rows: Sequence[Tensor | None] = [None] * len(self._parameters)
        if pairs:
            outputs, factors = zip(*pairs, strict=True)
            rows = torch.autograd.grad(
                outputs, self._parameters, factors, retain_graph=keep, allow_unused=True
            )
        for out, row in zip(total, rows, strict=True):
            receive(row, out, weight)

    def _along(self, vector: Direction) -> list[Tensor | None]:
        """J·v, for every output."""
        if vector.sides is not None:
            plus, minus = (self._outputs_at(side) for side in vector.sides)
            return [
                ((a - b) * vector.scale.to(a.device, a.dtype)).to(output.dtype)
                for a, b, output in zip(plus, minus, self._outputs, strict=True)
            ]
        if self._transposed is None:
            weights = [torch.zeros_like(out, requires_grad=True) for out in self._outputs]
            with twice("the outputs"):
                rows = torch.autograd.grad(
                    self._outputs, self._parameters, weights, create_graph=True, allow_unused=True
                )
            self._transposed = weights, rows
        weights, rows = self._transposed
        linear = [(r, v) for r, v in zip(rows, vector.parts, strict=True) if _is_linear(r)]
        if not linear:
            return [None] * len(weights)
        found, parts = zip(*linear, strict=True)
        with twice("the outputs"):
            return list(
                torch.autograd.grad(found, weights, parts, retain_graph=True, allow_unused=True)
            )

    def _outputs_at(self, values: Sequence[Tensor]) -> list[Tensor]:
        with self._at(values):
            found = self._pair.again(self._batch)
        # In float32 at least: a difference of 16-bit numbers would be lost to rounding once more.
        return [x if x.dtype == torch.float64 else x.float() for x in found]

    def _curved(self, moved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """M times it: 1/n of losses of samples, else by the Hessian of the loss of the outputs."""
        if self._pair.is_of_samples:
            return [None if u is None else u / u.numel() for u in moved]
        linear = [(s, u) for s, u in zip(self._slopes, moved, strict=True) if _is_linear(s)]
        linear = [(slope, u) for slope, u in linear if u is not None]
        if not linear:  # the loss is linear in the outputs
            return [None] * len(self._outputs)
        slopes, factors = zip(*linear, strict=True)
        with twice("the loss of the outputs"):
            return torch.autograd.grad(
                slopes, self._outputs, factors, retain_graph=True, allow_unused=True
            )


def _is_linear(row: Tensor | None) -> bool:
    return row is not None and row.requires_grad
