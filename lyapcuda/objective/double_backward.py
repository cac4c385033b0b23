"""Exact products of a Hessian and a vector: the gradient is differentiated once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lyapcuda.objective.evaluator import Closure, check_loss

__all__ = [
    "DoubleBackwardError",
    "GradientGraph",
    "held_bytes",
    "loss_to_differentiate",
    "receive",
    "twice",
]


class DoubleBackwardError(RuntimeError):
    """A loss that can't be differentiated twice."""


class GradientGraph:
    """Autograd's graph of a loss and its gradient at θ, from which any number of products is taken.

    The gradient's own numbers are let go: a product needs where it came from alone.

    Args:
        closure: returns the loss; must not call ``backward()`` itself.
        parameters: leaf tensors.
        take: handed the gradients, None where a parameter gets none.
        look: handed the loss before it is differentiated; returns further leaves, whose gradients
            ``take`` is handed after those of the parameters.

    Attributes:
        loss: 0-dim, detached.
        versions: of the parameters then.

    Raises:
        DoubleBackwardError: the closure called ``backward()``, its loss has no graph, or a function
            in it has no second derivative in torch.

    Example:
        >>> p = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> graph, out = GradientGraph(lambda: (p**3).sum(), [p]), [torch.empty(2)]
        >>> graph.product([torch.ones(2)], out, keep=False)
        >>> out
        [tensor([ 6., 12.])]
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Sequence[Tensor],
        take: Callable[[Sequence[Tensor | None]], None] | None = None,
        look: Callable[[Tensor], Sequence[Tensor]] | None = None,
    ) -> None:
        self._parameters = parameters
        with loss_to_differentiate(closure, parameters) as loss:
            others = look(loss) if look is not None else ()
            with twice():
                gradients = torch.autograd.grad(
                    loss, [*parameters, *others], create_graph=True, allow_unused=True
                )
        self.loss = loss.detach().reshape(())
        self.versions = [p._version for p in parameters]
        self._edges = [
            get_gradient_edge(g) if g is not None and g.requires_grad else None
            for g in gradients[: len(parameters)]
        ]
        if take is not None:
            take([None if g is None else g.detach() for g in gradients])

    def held_bytes(self) -> int:
        """How much memory it holds: what its functions have saved, as far as that shows."""
        return held_bytes([edge.node for edge in self._edges if edge is not None])

    def parts(self, vector: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor | None]:
        """Returns the product as autograd gives it: None where it is zero.

        Arguments, errors: as of `product`.
        """
        outputs = [(e, v) for e, v in zip(self._edges, vector, strict=True) if e is not None]
        if not outputs:  # the loss is linear in the parameters
            return [None] * len(self._parameters)
        edges, factors = zip(*outputs, strict=True)
        with twice():
            return torch.autograd.grad(
                edges, self._parameters, factors, retain_graph=keep, allow_unused=True
            )

    def product(
        self,
        vector: Sequence[Tensor],
        total: Sequence[Tensor],
        *,
        keep: bool,
        weight: float | None = None,
    ) -> None:
        """Writes the product to ``total``; with a ``weight``, adds so many times it.

        Args:
            vector, total: of the parameters' shapes.
            keep: the graph stays, for further products.

        Raises:
            DoubleBackwardError: a function in the loss has no second derivative in torch.
        """
        # Each part goes where it belongs as soon as it is known: no second vector is held.
        hooks = [
            parameter.register_hook(_receiver(out, weight))
            for parameter, out in zip(self._parameters, total, strict=True)
            if out.dtype == parameter.dtype
        ]
        try:
            rows = self.parts(vector, keep=keep)
        finally:
            for hook in hooks:
                hook.remove()
        for out, row in zip(total, rows, strict=True):
            if row is None or row.data_ptr() != out.data_ptr() or row.dtype != out.dtype:
                receive(row, out, weight)


def receive(row: Tensor | None, out: Tensor, weight: float | None) -> None:
    """Writes a part of a product, None for zero, to ``out``; with a weight adds that many of it."""
    if row is not None:
        _receiver(out, weight)(row)
    elif weight is None:
        out.zero_()


def held_bytes(roots: Sequence[Any]) -> int:
    """How much memory the functions above some nodes of autograd's graph have saved, as far as that
    shows.
    """
    nodes = [node for node in roots if node is not None]
    seen, held = set(nodes), {}
    while nodes:
        node = nodes.pop()
        for name in dir(node):
            if name.startswith("_saved_") and not name.startswith("_saved_tensors"):
                saved = getattr(node, name)
                if isinstance(saved, Tensor):
                    storage = saved.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return sum(held.values())


@contextmanager
def loss_to_differentiate(closure: Closure, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """Gives the loss, with its graph, of a closure that hasn't called ``backward()``.

    Raises:
        DoubleBackwardError: it has, or its loss has no graph.
    """
    for parameter in parameters:
        parameter.grad = None
    torch.clear_autocast_cache()
    with torch.enable_grad():
        loss = closure()
        check_loss(loss)
        if any(p.grad is not None for p in parameters):
            raise DoubleBackwardError(
                "closure: it called backward(); an exact product needs the loss alone"
            )
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise DoubleBackwardError("closure: the loss it returned can't be differentiated")
        yield loss
    torch.clear_autocast_cache()


def _receiver(out: Tensor, weight: float | None) -> Callable[[Tensor], Tensor]:
    def receive(part: Tensor) -> Tensor:
        part = part.detach()
        return out.copy_(part) if weight is None else out.add_(part, alpha=weight)

    return receive


@contextmanager
def twice(what: str = "the loss") -> Iterator[None]:
    """A context in which what has no second derivative raises a DoubleBackwardError."""
    try:
        yield
    except RuntimeError as error:
        raise DoubleBackwardError(
            f"mode=exact: {what} can't be differentiated twice ({error}); gradient differences "
            "(mode='difference') don't need that"
        ) from error
