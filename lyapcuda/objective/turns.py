"""One step at a time, whoever asks."""

from __future__ import annotations

import threading

__all__ = ["Turns"]


class Turns:
    """A context that one thread at a time is in: others wait, and re-entering is an error.

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

    def __reduce__(self) -> tuple[type[Turns], tuple[str]]:  # nobody is inside a copy
        return Turns, (self._what,)
