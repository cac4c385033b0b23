"""Gauss-Newton products Jᵀ·M·J·v of a loss ℓ(f(θ)): J is the Jacobian of the outputs f, and M the
Hessian of ℓ, or 1/n.

J·v comes from double backward, or from a difference of two forward passes; Jᵀ from one backward
pass. M needs second derivatives of ℓ alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
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

NOTHING = "outputs: none of them depends on the parameters"

__all__ = ["Direction", "GaussNewtonGraph", "OutputsAndLoss"]


@dataclass
class Evaluated:
    """One evaluation of the outputs and of their loss.

    Attributes:
        outputs: f, those that depend on something; in the graph of the model.
        handed: what the loss was taken of in their place: leaves, so that slopes by one of them
            don't count what goes by way of another. Empty where the outputs are losses.
        places: of the outputs among all tensors that were returned.
        batch: the arguments of that evaluation.
    """

    outputs: list[Tensor]
    handed: list[Tensor]
    places: list[int]
    batch: tuple[Any, ...]


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
        self._last: Evaluated | None = None

    def __call__(self, *batch: Any) -> Tensor:
        """The loss. Raises a TypeError or ValueError for outputs that aren't any."""
        self._last = None
        found = self._outputs(*batch)
        leaves, structure = pytree.tree_flatten(found)
        places = [i for i, leaf in enumerate(leaves) if _counts(leaf)]
        outputs = [leaves[i] for i in places]
        if self._loss is None:
            if not isinstance(found, Tensor) or found.dim() == 0:
                raise ValueError(
                    f"losses: expected a tensor of one loss a sample, got {described(found)}; as "
                    "of cross_entropy(..., reduction='none')"
                )
            self._last = Evaluated(outputs, [], places, batch)
            return found.mean()
        handed = [leaf.detach().requires_grad_() for leaf in outputs]
        for place, leaf in zip(places, handed, strict=True):
            leaves[place] = leaf.clone()  # the loss may write to it
        loss = self._loss(pytree.tree_unflatten(leaves, structure), *batch)
        if any(loss is leaf for leaf in leaves if isinstance(leaf, Tensor)):
            raise ValueError(
                "loss: it returns one of the outputs as it is, which has no curvature: return the "
                "loss of the logits, say"
            )
        self._last = Evaluated(outputs, handed, places, batch)
        return loss

    @property
    def outputs(self) -> list[Tensor]:
        """Those of the last call, as long as nobody has taken them."""
        return [] if self._last is None else self._last.outputs

    def take(self) -> Evaluated:
        """The last call's; lets go of it."""
        found, self._last = self._last, None
        return found or Evaluated([], [], [], ())

    def again(self, evaluated: Evaluated) -> list[Tensor]:
        """The same outputs, of the parameters as they are now, detached."""
        # With a graph, though none is kept: without one torch may take another way to them.
        with torch.enable_grad():
            leaves = pytree.tree_leaves(self._outputs(*evaluated.batch))
        return [leaves[place].detach() for place in evaluated.places]

    @property
    def is_of_samples(self) -> bool:
        """Whether the outputs are losses, one a sample."""
        return self._loss is None


def _counts(leaf: Any) -> bool:
    """Whether a part of the outputs is a tensor that depends on something."""
    if is_dataclass(leaf) and not isinstance(leaf, type):
        raise TypeError(
            f"outputs: {described(leaf)} is a dataclass: return its tensors, as a tuple or a dict"
        )
    if not isinstance(leaf, Tensor) or not leaf.requires_grad:
        return False
    if leaf.is_complex():
        raise TypeError(f"outputs: {described(leaf)} is complex: return torch.view_as_real of it")
    return True


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
            if look is not None:
                for output in pair.outputs:
                    look(output)
            self._evaluated = pair.take()
            self._outputs = self._evaluated.outputs
            if not self._outputs:
                raise ValueError(NOTHING)
            self._slopes: Sequence[Tensor | None] = ()
            if not pair.is_of_samples:
                with twice("the loss of the outputs"):
                    self._slopes = torch.autograd.grad(
                        loss, self._evaluated.handed, create_graph=True, allow_unused=True
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
            if all(row is None for row in rows):
                raise ValueError(NOTHING)
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
            if all(row is None for row in rows):
                raise ValueError(NOTHING)
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
            found = self._pair.again(self._evaluated)
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
                slopes, self._evaluated.handed, factors, retain_graph=True, allow_unused=True
            )


def _is_linear(row: Tensor | None) -> bool:
    return row is not None and row.requires_grad
