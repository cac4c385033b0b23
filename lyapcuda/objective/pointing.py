"""Parameters that hold θ + q for a while; θ itself isn't written.

The shards of FSDP2 are the exception: they are written, and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from lyapcuda.objective.interrupts import deferred
from lyapcuda.params.shards import any_sharded, in_place

__all__ = ["aside", "at_a_copy", "pointing"]

#: True while a closure is evaluated for the measurement alone.
_displaced: ContextVar[bool] = ContextVar("lyapcuda_displaced", default=False)


def at_a_copy() -> bool:
    """Returns whether the caller is inside a closure that is evaluated for a measurement alone: at
    θ + q, or once more at θ to check it.

    Each step evaluates the closure at copies of the parameters first, and at θ in the end, as
    training does. What a closure does besides computing its loss (it appends to a list, updates a
    metric that is no module, prints) belongs where this is False.

    Example:
        >>> theta = torch.ones(3, requires_grad=True)
        >>> losses = []
        >>> def closure():
        ...     loss = theta.square().sum()
        ...     if not lyapcuda.at_a_copy():
        ...         losses.append(float(loss))
        ...     return loss
        >>> _ = lyapcuda.CurvatureTracker([theta]).step(closure)
        >>> losses
        [3.0]
    """
    return _displaced.get()


@contextmanager
def aside() -> Iterator[None]:
    """Inside, `at_a_copy` is true, though the parameters are at θ."""
    token = _displaced.set(True)
    try:
        yield
    finally:
        _displaced.reset(token)


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
