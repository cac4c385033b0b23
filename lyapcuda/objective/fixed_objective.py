"""One fixed function at any number of points: what a frozen θ and its data make of a closure.

Every evaluation starts from the same random states and module buffers, over the same batches, so
that differences of gradients belong to one symmetric Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lyapcuda.objective.batches import Batches
from lyapcuda.objective.evaluator import Closure, check_loss, evaluate, pointing_to
from lyapcuda.objective.isolation import Surroundings
from lyapcuda.objective.random_states import RandomStates

__all__ = ["Kept", "Point", "gradients_at", "second_derivative"]

#: What is handed the gradients where they lie, None where a parameter gets none.
Take = Callable[[list[Tensor | None]], None]
#: Where to evaluate (None: at the parameters themselves), and the tensors that take the gradient.
Point = tuple[Sequence[Tensor] | None, Sequence[Tensor] | Take]


def gradients_at(
    closure: Closure,
    parameters: Sequence[Tensor],
    points: Sequence[Point],
    *,
    names: Sequence[str],
    modules: Sequence[nn.Module] = (),
    states: RandomStates | None = None,
    batches: Batches | None = None,
) -> list[Tensor]:
    """Gradients of one fixed function: each evaluation starts from the same states and buffers.

    Args:
        closure: called once for every point; with ``batches`` once for every batch of each.
        parameters, names, modules: as for `lyapcuda.objective.evaluator.gradients`.
        points: where to evaluate, and tensors of the parameters' shapes that receive the gradient,
            zeros where a parameter gets none. Both may be the same memory, except with ``batches``,
            whose gradients are added up there. Without them a function may stand in their place:
            it is handed the gradients as they are, which saves a copy, and may write to where they
            were evaluated.
        states: the random states that each evaluation starts from; None for the present ones.
        batches: losses and gradients are averaged over them, weighted by their sizes.

    Returns:
        The losses (0-dim, detached), in the points' order. Everything is as it was, gradients and
        random states included, after an exception as well.
    """
    before = Surroundings(parameters, modules, batches.generators if batches else ())
    losses = []
    try:
        for where, gradient in points:
            if losses:
                before.restore()
            if states is not None:
                states.restore()
            with nullcontext() if where is None else pointing_to(parameters, where, modules):
                losses.append(_average(closure, parameters, names, gradient, batches))
    finally:
        before.restore()
        before.restore_gradients()
    return losses


def _average(
    closure: Closure,
    parameters: Sequence[Tensor],
    names: Sequence[str],
    total: Sequence[Tensor] | Take,
    batches: Batches | None,
) -> Tensor:
    """One evaluation into ``total``; over batches, the mean weighted by their sizes."""
    if batches is None:
        loss, gradients = evaluate(closure, parameters, names)
        if callable(total):
            total(gradients)
            return loss
        for out, gradient in zip(total, gradients, strict=True):
            out.zero_() if gradient is None else out.copy_(gradient.detach())
        return loss
    for out in total:
        out.zero_()
    samples, loss_sum = 0, torch.zeros((), dtype=torch.float64)
    for batch, size in batches:
        loss, gradients = evaluate(lambda b=batch: closure(b), parameters, names)
        for out, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                out.add_(gradient.detach(), alpha=size)
        samples, loss_sum = samples + size, loss_sum.to(loss.device) + size * loss.double()
    for out in total:
        out.div_(samples)
    return loss_sum / samples


@dataclass
class Graph:
    """Autograd's graph of a loss and its gradient, from which exact products are taken.

    Attributes:
        loss: 0-dim, detached.
        gradients: None for a parameter that the loss doesn't depend on.
        versions: of the parameters then.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    versions: list[int]


class Kept:
    """Holds the graph of one batch from one product to the next: about half of a product's time,
    for the memory of the activations.
    """

    graph: Graph | None = None


def second_derivative(
    closure: Closure,
    parameters: Sequence[Tensor],
    vector: Sequence[Tensor],
    total: Sequence[Tensor],
    *,
    names: Sequence[str],
    modules: Sequence[nn.Module] = (),
    states: RandomStates | None = None,
    batches: Batches | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """The exact product of the Hessian and a vector, by double backward, into ``total``.

    Arguments as for `gradients_at`; the closure must not call ``backward()`` itself. ``kept``: the
    graph is taken from there, while the parameters are what they were, and left there. With
    ``batches`` there is one for each, and none is kept.

    Raises:
        RuntimeError: something in the loss has no second derivative in torch.
    """
    before = Surroundings(parameters, modules, batches.generators if batches else ())
    try:
        if states is not None:
            states.restore()
        if batches is None:
            return _into(total, *_second(closure, parameters, vector, kept))
        for out in total:
            out.zero_()
        samples, loss_sum = 0, torch.zeros((), dtype=torch.float64)
        for batch, size in batches:
            loss, rows = _second(lambda b=batch: closure(b), parameters, vector, None)
            for out, row in zip(total, rows, strict=True):
                if row is not None:
                    out.add_(row, alpha=size)
            samples, loss_sum = samples + size, loss_sum.to(loss.device) + size * loss.double()
    finally:
        before.restore()
        before.restore_gradients()
    for out in total:
        out.div_(samples)
    return loss_sum / samples


def _into(total: Sequence[Tensor], loss: Tensor, rows: Sequence[Tensor | None]) -> Tensor:
    for out, row in zip(total, rows, strict=True):
        out.zero_() if row is None else out.copy_(row)
    return loss


def _second(
    closure: Closure, parameters: Sequence[Tensor], vector: Sequence[Tensor], kept: Kept | None
) -> tuple[Tensor, Sequence[Tensor | None]]:
    graph = None if kept is None else kept.graph
    if graph is not None and graph.versions == [p._version for p in parameters]:
        return graph.loss, _rows(graph, parameters, vector, keep=True)
    if kept is not None:
        kept.graph = graph = None  # before there is another one
    torch.clear_autocast_cache()
    with torch.enable_grad():
        graph = _graph(closure, parameters)
        rows = _rows(graph, parameters, vector, keep=kept is not None)
    torch.clear_autocast_cache()
    if kept is not None:
        kept.graph = graph
    return graph.loss, rows


def _graph(closure: Closure, parameters: Sequence[Tensor]) -> Graph:
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
    return Graph(loss.detach().reshape(()), gradients, [p._version for p in parameters])


def _rows(
    graph: Graph, parameters: Sequence[Tensor], vector: Sequence[Tensor], keep: bool
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
