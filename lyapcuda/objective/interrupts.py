"""Steps that are atomic under Ctrl-C and among threads."""

from __future__ import annotations

import _signal  # signal.py's own wrap these in enums, which takes as long as all the rest here
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIGINT
from types import FrameType
from typing import Any

__all__ = ["StepLock", "allowed", "deferred"]

_SIGINT = SIGINT.value


class _Note:
    """A handler of SIGINT that notes it down for the one it stands in for."""

    def __init__(self, instead_of: Callable[[int, FrameType | None], Any]) -> None:
        self.instead_of = instead_of
        self._asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def deliver(self) -> None:
        if self._asked:
            self._asked = False
            self.instead_of(_SIGINT, None)


def _handler() -> Any:
    """The present one; None where signals don't arrive in Python."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return _signal.getsignal(_SIGINT)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a Ctrl-C waits for the end, or for `allowed`."""
    before = _handler()
    if not callable(before) or isinstance(before, _Note):
        yield
        return
    note = _Note(before)
    _signal.signal(_SIGINT, note)
    try:
        yield
    finally:
        _signal.signal(_SIGINT, note.instead_of)
        note.deliver()


@contextmanager
def allowed() -> Iterator[None]:
    """Inside `deferred`: here a Ctrl-C may arrive after all."""
    note = _handler()
    if not isinstance(note, _Note):
        yield
        return
    _signal.signal(_SIGINT, note.instead_of)
    try:
        note.deliver()
        yield
    finally:
        now = _signal.getsignal(_SIGINT)
        if callable(now) and not isinstance(now, _Note):  # what is inside may have set its own
            note.instead_of = now
        _signal.signal(_SIGINT, note)


class StepLock:
    """Lets one thread at a time take a step: others wait, and re-entering is an error.

    Args:
        what: for the message of the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise RuntimeError(f"{self._what} was called from within its own closure")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *exception: object) -> None:
        self._holder = None
        self._lock.release()

    def __reduce__(self) -> tuple[type[StepLock], tuple[str]]:  # nobody is inside a copy
        return StepLock, (self._what,)
