"""One fixed function at any number of points: what a frozen θ and its data make of a closure.

Every evaluation starts from the same random states and module buffers, over the same batches, so
that differences of gradients belong to one symmetric Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lyapcuda.batches import Batches
from lyapcuda.evaluate import Closure, check_loss, evaluate, pointing_to
from lyapcuda.surroundings import RandomStates, Surroundings

__all__ = ["Point", "gradients_at", "second_derivative"]

#: Where to evaluate (None: at the parameters themselves), and the tensors that take the gradient.
Point = tuple[Sequence[Tensor] | None, Sequence[Tensor]]


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
        parameters, names, modules: as for `lyapcuda.evaluate.gradients`.
        points: where to evaluate, and tensors of the parameters' shapes that receive the gradient,
            zeros where a parameter gets none. Both may be the same memory, except with ``batches``,
            whose gradients are added up there.
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
    total: Sequence[Tensor],
    batches: Batches | None,
) -> Tensor:
    """One evaluation into ``total``; over batches, the mean weighted by their sizes."""
    if batches is None:
        loss, gradients = evaluate(closure, parameters, names)
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
) -> Tensor:
    """The exact product of the Hessian and a vector, by double backward, into ``total``.

    Arguments as for `gradients_at`; the closure must not call ``backward()`` itself.

    Raises:
        RuntimeError: something in the loss has no second derivative in torch.
    """
    before = Surroundings(parameters, modules, batches.generators if batches else ())
    for out in total:
        out.zero_()
    samples, loss_sum = 0, torch.zeros((), dtype=torch.float64)
    try:
        if states is not None:
            states.restore()
        for call, size in (
            [(closure, 1)]
            if batches is None
            else ((lambda b=batch: closure(b), n) for batch, n in batches)
        ):
            loss, rows = _second(call, parameters, vector)
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


def _second(
    closure: Closure, parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    for parameter in parameters:
        parameter.grad = None
    torch.clear_autocast_cache()
    with torch.enable_grad():
        loss = closure()
        check_loss(loss)
        if any(p.grad is not None for p in parameters):
            raise ValueError("closure: it called backward(); an exact product needs the loss alone")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError("closure: the loss it returned can't be differentiated")
        try:
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            pairs = [
                (g, v)
                for g, v in zip(gradients, vector, strict=True)
                if g is not None and g.requires_grad
            ]
            if not pairs:  # linear in the parameters
                return loss.detach().reshape(()), [None] * len(parameters)
            rows = torch.autograd.grad(
                [g for g, _ in pairs], parameters, [v for _, v in pairs], allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"mode=exact: the loss can't be differentiated twice ({error}); gradient "
                "differences (mode='difference') don't need that"
            ) from error
    torch.clear_autocast_cache()
    return loss.detach().reshape(()), rows
