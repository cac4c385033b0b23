"""One fixed function at any number of points: a closure, its data and its random states, frozen.

Every evaluation starts from the same random states and module buffers, over the same batches, so
that differences of gradients belong to one symmetric Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapcuda.objective.batches import Batches
from lyapcuda.objective.evaluator import Closure, Evaluator, check_loss
from lyapcuda.objective.random_states import RandomStates

__all__ = ["FixedObjective", "Point"]

#: What is handed the gradients where they lie, None where a parameter gets none.
Take = Callable[[list[Tensor | None]], None]
#: Where to evaluate (None: at the parameters themselves), and the tensors that take the gradient.
Point = tuple[Sequence[Tensor] | None, Sequence[Tensor] | Take]


@dataclass
class _Graph:
    """Autograd's graph of a loss and its gradient, from which exact products are taken.

    Attributes:
        loss: 0-dim, detached.
        gradients: None for a parameter that the loss doesn't depend on.
        versions: of the parameters then.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    versions: list[int]


class FixedObjective:
    """A closure as one function of the parameters: every evaluation starts from the same states.

    After every call, and after an exception, everything is as it was, gradients and random states
    included.

    Args:
        evaluator: of the parameters.
        closure: returns the loss; with ``batches`` it takes a batch.
        batches: losses and gradients are averaged over them, weighted by their sizes.

    Example:
        >>> p = torch.tensor([3.0], requires_grad=True)
        >>> objective = FixedObjective(Evaluator([p], ["p"]), lambda: p.square().sum())
        >>> out = [torch.empty(1)]
        >>> objective.gradients_at([([torch.tensor([5.0])], out)])
        [tensor(25.)]
        >>> out
        [tensor([10.])]
    """

    def __init__(
        self, evaluator: Evaluator, closure: Closure, batches: Batches | None = None
    ) -> None:
        self.evaluator, self.closure, self.batches = evaluator, closure, batches
        self._generators = batches.generators if batches else ()
        devices = (p.device for p in evaluator.parameters)
        self._states = RandomStates(devices, self._generators)
        #: Of one batch, from one product to the next, inside `keeping_graph`.
        self._graph: _Graph | None = None
        self._keeps = False

    def gradients_at(self, points: Sequence[Point], closure: Closure | None = None) -> list[Tensor]:
        """Evaluates the gradient at each of the points.

        Args:
            points: where to evaluate, and tensors of the parameters' shapes that receive the
                gradient, zeros where a parameter gets none. Both may be the same memory, except
                with batches, whose gradients are added up there. Without them a function may stand
                in their place: it is handed the gradients as they are, which saves a copy, and may
                write to where they were evaluated.
            closure: stands in for the objective's own, of which it is a wrapper.

        Returns:
            The losses (0-dim, detached), in the points' order.
        """
        closure = self.closure if closure is None else closure
        before = self.evaluator.snapshot(self._generators)
        losses = []
        try:
            for where, gradient in points:
                if losses:
                    before.restore()
                self._states.restore()
                with nullcontext() if where is None else self.evaluator.pointing_to(where):
                    losses.append(self._average(closure, gradient))
        finally:
            before.restore()
            before.restore_gradients()
        return losses

    def _average(self, closure: Closure, total: Sequence[Tensor] | Take) -> Tensor:
        """One evaluation into ``total``; over batches, the mean weighted by their sizes."""
        if self.batches is None:
            loss, gradients = self.evaluator.evaluate(closure)
            if callable(total):
                total(gradients)
                return loss
            return _into(total, loss, gradients)
        return self._over_batches(total, lambda b: self.evaluator.evaluate(lambda: closure(b)))

    def _over_batches(
        self,
        total: Sequence[Tensor],
        one: Callable[[Any], tuple[Tensor, Sequence[Tensor | None]]],
    ) -> Tensor:
        """The mean of what ``one`` gives for every batch, weighted by the batches' sizes."""
        for out in total:
            out.zero_()
        samples, loss_sum = 0, torch.zeros((), dtype=torch.float64)
        for batch, size in self.batches:
            loss, rows = one(batch)
            for out, row in zip(total, rows, strict=True):
                if row is not None:
                    out.add_(row.detach(), alpha=size)
            samples, loss_sum = samples + size, loss_sum.to(loss.device) + size * loss.double()
        for out in total:
            out.div_(samples)
        return loss_sum / samples

    # --- exact products --------------------------------------------------------------------------

    @contextmanager
    def keeping_graph(self) -> Iterator[None]:
        """Inside, exact products over one batch keep autograd's graph from one to the next.

        That saves about half of a product's time, for the memory of the activations.
        """
        outer, self._keeps = self._keeps, True
        try:
            yield
        finally:
            self._keeps = outer
            if not outer:
                self._graph = None

    def hessian_product(self, vector: Sequence[Tensor], total: Sequence[Tensor]) -> Tensor:
        """Writes the exact product of the Hessian and a vector, by double backward, to ``total``.

        The closure must not call ``backward()`` itself. With batches no graph is kept.

        Returns:
            The loss, 0-dim, detached.

        Raises:
            RuntimeError: something in the loss has no second derivative in torch.
        """
        before = self.evaluator.snapshot(self._generators)
        try:
            self._states.restore()
            if self.batches is None:
                return _into(total, *self._second(self.closure, vector, self._keeps))
            return self._over_batches(
                total, lambda b: self._second(lambda: self.closure(b), vector, False)
            )
        finally:
            before.restore()
            before.restore_gradients()

    def _second(
        self, closure: Closure, vector: Sequence[Tensor], keep: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        parameters = self.evaluator.parameters
        graph = self._graph if keep else None
        if graph is not None and graph.versions == [p._version for p in parameters]:
            return graph.loss, _rows(graph, parameters, vector, keep=True)
        self._graph = graph = None  # before there is another one
        torch.clear_autocast_cache()
        with torch.enable_grad():
            graph = _graph_of(closure, parameters)
            rows = _rows(graph, parameters, vector, keep)
        torch.clear_autocast_cache()
        if keep:
            self._graph = graph
        return graph.loss, rows


def _into(total: Sequence[Tensor], loss: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    for out, row in zip(total, rows, strict=True):
        out.zero_() if row is None else out.copy_(row.detach())
    return loss


def _graph_of(closure: Closure, parameters: Sequence[Tensor]) -> _Graph:
    for parameter in parameters:
        parameter.grad = None
    loss = closure()
    check_loss(loss)
    if any(p.grad is not None for p in parameters):
        raise ValueError("closure: it called backward(); an exact product needs the loss alone")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError("closure: the loss it returned can't be differentiated")
    with _twice():
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return _Graph(loss.detach().reshape(()), gradients, [p._version for p in parameters])


def _rows(
    graph: _Graph, parameters: Sequence[Tensor], vector: Sequence[Tensor], keep: bool
) -> Sequence[Tensor | None]:
    pairs = [
        (g, v)
        for g, v in zip(graph.gradients, vector, strict=True)
        if g is not None and g.requires_grad
    ]
    if not pairs:  # linear in the parameters
        return [None] * len(parameters)
    with _twice():
        return torch.autograd.grad(
            [g for g, _ in pairs],
            parameters,
            [v for _, v in pairs],
            retain_graph=keep,
            allow_unused=True,
        )


@contextmanager
def _twice() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"mode=exact: the loss can't be differentiated twice ({error}); gradient differences "
            "(mode='difference') don't need that"
        ) from error
