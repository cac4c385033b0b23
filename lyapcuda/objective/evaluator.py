"""The gradient of a user's closure at θ and at every θ + q, with everything else held equal.

All evaluations see the same random numbers and the same module buffers (dropout masks, BatchNorm
statistics), in the mode the user set. Gradients come from ``.backward()``, so checkpointing, hooks
and accumulation inside the closure work. θ itself is never written: for the evaluation at θ + q the
parameters point to another buffer, and back. The shards of FSDP2 are the exception: they are
written, and put back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda.objective.interrupts import allowed, deferred
from lyapcuda.objective.isolation import Surroundings
from lyapcuda.params.shards import any_sharded, in_place, locals_of, reset

__all__ = [
    "Closure",
    "Gradients",
    "at_a_copy",
    "gradients",
    "lacks_any",
    "plain_gradient",
]

#: Takes nothing (where batches are streamed: a batch), returns the loss; may have called backward()
#: itself or leave that to us.
Closure = Callable[..., Tensor | float]


@dataclass(frozen=True)
class Gradients:
    """Gradients at θ and at each copy θ + q_j, None where there is none; the losses, detached."""

    g0: list[Tensor | None]
    copies: list[list[Tensor | None]]
    loss0: Tensor
    losses: list[Tensor]

    def of(self, first: int, count: int) -> Gradients:
        """Those of ``count`` copies from the ``first`` on."""
        span = slice(first, first + count)
        return Gradients(self.g0, self.copies[span], self.loss0, self.losses[span])


_GRAD, _LAYOUT = operator.attrgetter("grad"), operator.attrgetter("layout")

#: True while a closure is evaluated at θ + q.
_displaced: ContextVar[bool] = ContextVar("lyapcuda_displaced", default=False)


def at_a_copy() -> bool:
    """Whether the caller is inside a closure that is being evaluated at θ + q, not at θ."""
    return _displaced.get()


@contextmanager
def pointing(
    parameters: Sequence[Tensor], modules: Sequence[nn.Module] = ()
) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """Gives a function that has the parameters hold the copies it is called with, until it is
    called again or the end; θ itself is not written, but where it is sharded.

    A Ctrl-C waits for the end, or for `allowed`.
    """
    with deferred():
        token = _displaced.set(True)
        try:
            with (in_place if any_sharded(parameters) else _pointing)(parameters, modules) as hold:
                yield hold
        finally:
            _displaced.reset(token)


@contextmanager
def _pointing(
    parameters: Sequence[Tensor], modules: Sequence[nn.Module]
) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    originals = [p.data for p in parameters]

    def hold(copies: Sequence[Tensor]) -> None:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data = copy

    try:
        yield hold
    finally:
        hold(originals)


@contextmanager
def pointing_to(
    parameters: Sequence[Tensor], copies: Sequence[Tensor], modules: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Has the parameters hold ``copies``; θ itself is not written, but where it is sharded."""
    with pointing(parameters, modules) as hold:
        hold(copies)
        with allowed():
            yield


def check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"closure: expected it to return the loss, got {type(loss).__name__}: {loss!r}"
        )
    if isinstance(loss, Tensor) and loss.is_complex():
        raise ValueError(f"closure: expected a real loss, got {loss.dtype}")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"closure: expected a loss of one element, got shape {tuple(loss.shape)}")


def lacks_any(gradients: Sequence[Tensor | None]) -> bool:
    """Whether one of them is None."""
    return any(map(operator.is_, gradients, repeat(None)))


def _appeared(parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
    """The parameters' gradients; None where none of them has one."""
    # map(), here and below: these passes over all tensors are a good part of what a step costs.
    found = list(map(_GRAD, parameters))
    return None if all(map(operator.is_, found, repeat(None))) else found


def evaluate(
    closure: Closure, parameters: Sequence[Tensor], names: Sequence[str]
) -> tuple[Tensor, list[Tensor | None]]:
    """One evaluation with cleared gradients: the detached loss and the gradients that appeared."""
    for parameter in parameters:
        parameter.grad = None
    # Inside the user's autocast, cast weights are cached by tensor: they would be those of θ.
    torch.clear_autocast_cache()
    with torch.enable_grad(), allowed():
        loss = closure()
        check_loss(loss)
        found = _appeared(parameters)
        if found is None:
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ValueError(
                    "closure: no parameter got a gradient, and the loss it returned can't be "
                    "differentiated: does it depend on the tracked parameters (outside of "
                    "torch.inference_mode)?"
                )
            loss.backward()
            found = _appeared(parameters)
            if found is None:
                raise ValueError(
                    "closure: its loss gives none of the tracked parameters a gradient: were they "
                    "replaced since, or do they belong to another model?"
                )
    torch.clear_autocast_cache()
    gradients = locals_of(found)
    present = [g for g in gradients if g is not None] if lacks_any(gradients) else gradients
    if set(map(_LAYOUT, present)) != {torch.strided}:
        i = next(i for i, g in enumerate(gradients) if g is not None and g.layout != torch.strided)
        raise TypeError(
            f"closure: the gradient of {names[i]} has layout {gradients[i].layout}; only dense "
            "(strided) gradients can be tracked (nn.Embedding: sparse=False)"
        )
    value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
    return value.reshape(()), gradients


def _check_same(
    loss: Tensor, once: Sequence[Tensor | None], loss0: Tensor, g0: Sequence[Tensor | None]
) -> None:
    """Raises a RuntimeError where two evaluations at the same θ differ by more than rounding."""
    reason = "expected the same loss and gradient every time"
    apart = square = coarsest = 0.0
    for a, b in zip(once, g0, strict=True):
        if a is None or b is None:
            if a is not b:
                raise RuntimeError(f"closure: a gradient at the same θ came once only; {reason}")
            continue
        apart += float((a.double() - b.double()).square().sum())
        square += float(b.double().square().sum())
        coarsest = max(coarsest, torch.finfo(b.dtype).eps)
    # Rounding that isn't the same every time (atomics on a GPU) stays far below the root of ε.
    rounding = math.sqrt(coarsest)
    first, second = float(loss), float(loss0)
    same = math.isclose(first, second, rel_tol=rounding) or math.isnan(first) and math.isnan(second)
    if not same or apart > rounding**2 * square:
        raise RuntimeError(
            f"closure: two evaluations at the same θ gave the losses {first:.9g} and {second:.9g}, "
            f"gradients {math.sqrt(apart):.3g} apart of norm {math.sqrt(square):.3g}; {reason}: "
            "take the minibatch from the loader outside of the closure, and random numbers from "
            "the global generators"
        )


@torch.no_grad()
def _moved(gradients: Sequence[Tensor | None], to: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in the memory of other tensors like them, as far as there are any."""
    if not lacks_any(gradients):
        torch._foreach_copy_(to, gradients)  # as torch.optim does
        return list(to)
    moved = [None if g is None else c for c, g in zip(to, gradients, strict=True)]
    there, held = ([t for t in some if t is not None] for some in (moved, gradients))
    torch._foreach_copy_(there, held)
    return moved


def gradients(
    closure: Closure,
    parameters: Sequence[Tensor],
    copies: Sequence[Sequence[Tensor]],
    *,
    names: Sequence[str],
    modules: Sequence[nn.Module] = (),
    leave: bool = False,
    check: bool = False,
) -> Gradients:
    """Evaluates the closure at every one of ``copies`` (θ + q_j) and then at the parameters (θ).

    Args:
        closure: called once a copy and once more.
        parameters: leaf tensors that require a gradient.
        copies: each θ + q_j, of the parameters' shapes, dtypes and devices (of DTensors, of this
            rank's part); come back holding the gradient there.
        names: the parameters' names, for messages.
        modules: whose buffers (and other parameters' gradients) are put back.
        leave: False puts everything back as it was, gradients and random states included. True
            leaves behind what one plain evaluation at θ leaves: its gradients in ``.grad``, the
            random states and buffers after it.
        check: evaluate once more at θ, and raise where the two differ. Waits for the device.

    Raises:
        TypeError, ValueError: the closure returned no loss, or a gradient is sparse. After these,
            as after any exception of the closure's own, everything is as it was.
        RuntimeError: ``check`` found the closure to be another function each time.
    """
    before = Surroundings(parameters, modules)
    found, losses = [], []
    try:
        # θ last: that evaluation leaves what training expects.
        with pointing(parameters, modules) if copies else nullcontext() as hold:
            for copy in copies:
                hold(copy)
                loss, there = evaluate(closure, parameters, names)
                # θ + q is no longer needed, so its gradient takes its place. By reference it
                # wouldn't be safe: storage may be used again (DDP's buckets, a closure that writes
                # .grad), and memory would hold one gradient more for every copy.
                found.append(_moved(there, copy))
                del there
                losses.append(loss)
                before.restore()
        if check:  # the last two of all, so that a closure that alternates is found too
            loss, once = evaluate(closure, parameters, names)
            once = [g if g is None else g.detach().clone() for g in once]
            before.restore()
        loss0, g0 = evaluate(closure, parameters, names)
        if check:
            _check_same(loss, once, loss0, g0)
    except BaseException:
        reset(modules)
        before.restore()
        before.restore_gradients()
        raise
    if not leave:
        before.restore()
        before.restore_gradients()
    return Gradients(g0, found, loss0, losses)


def plain_gradient(
    closure: Closure,
    parameters: Sequence[Tensor],
    *,
    names: Sequence[str],
    modules: Sequence[nn.Module] = (),
) -> Tensor:
    """One evaluation at θ, its gradient left in ``.grad``; returns the detached loss.

    After an exception everything is as it was, as for `gradients`.
    """
    return gradients(closure, parameters, (), names=names, modules=modules, leave=True).loss0
