"""Tells listeners of every backward pass, before its graph is freed and after its gradients lie."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = ["Listener", "Outermost", "listening"]


class Listener(Protocol):
    """Is told of backward passes of any thread."""

    def before(self, roots: Sequence[Any]) -> None:
        """Called with what ``torch.autograd.backward`` was called on."""

    def after(self, *, failed: bool = False) -> None:
        """Called once it has returned; ``failed``: once it has raised."""


class Outermost:
    """A listener to the passes of the thread that made it, without those within another pass."""

    def __init__(self) -> None:
        self._thread, self._depth = threading.get_ident(), 0

    def begins(self, roots: Sequence[Any]) -> None:
        """Called before a pass."""

    def ended(self) -> None:
        """Called after a pass."""

    @property
    def is_inside(self) -> bool:
        """Whether a pass is under way."""
        return self._depth > 0

    def before(self, roots: Sequence[Any]) -> None:
        if threading.get_ident() == self._thread:
            if not self._depth:
                self.begins(roots)
            self._depth += 1

    def after(self, *, failed: bool = False) -> None:
        if threading.get_ident() == self._thread:
            self._depth -= 1
            if not self._depth and not failed:
                self.ended()


# Of one thread again and again: a Ctrl-C just before it is let go of must not lock that out.
_lock = threading.RLock()
_listeners: list[Listener] = []
_real = torch.autograd.backward


@functools.wraps(_real)
def _heard_backward(tensors: Any, *args: Any, **options: Any) -> None:
    roots = [tensors] if isinstance(tensors, Tensor | GradientEdge) else list(tensors)
    heard = tuple(_listeners)
    for listener in heard:
        listener.before(roots)
    try:
        _real(roots, *args, **options)
    except BaseException:
        for listener in heard:
            listener.after(failed=True)
        raise
    for listener in heard:
        listener.after()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, the listener is told of every backward pass.

    `Tensor.backward` looks torch.autograd.backward up when it is called, so that is what stands in
    for a while.
    """
    global _real
    try:
        with _lock:
            if torch.autograd.backward is not _heard_backward:
                _real, torch.autograd.backward = torch.autograd.backward, _heard_backward
            _listeners.append(listener)
        yield
    finally:
        with _lock:
            _listeners[:] = [other for other in _listeners if other is not listener]
            if not _listeners and torch.autograd.backward is _heard_backward:
                torch.autograd.backward = _real
