"""Checks of arguments; every error names the argument and, in a few words, its value."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_OURS = re.compile(r"(lyapcuda|torch|contextlib)\b").match
#: Characters of a value in a message.
_ROOM = 60
_PLAIN = (str, bytes, Real, complex, type(None), torch.dtype, torch.device)


def described(value: Any) -> str:
    """A value as an error's message names it: in one short line, and never a tensor's numbers."""
    if isinstance(value, _PLAIN):
        text = repr(value)
        return text if len(text) <= _ROOM else f"{text[: _ROOM - 1]}…"
    if _is_plain(value) and len(value) <= _ROOM and len(repr(value)) <= _ROOM:
        return repr(value)
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    name = type(value).__name__
    if isinstance(value, Tensor) or name == "ndarray":
        return f"<{name} of shape {tuple(value.shape)}>"
    count = operator.length_hint(value, -1) if isinstance(value, Iterable) else -1
    return f"<{name}>" if count < 0 else f"<{name} of {count}>"


def _is_plain(value: Any) -> bool:
    """Whether it is a list of numbers and text, or of such lists."""
    if not isinstance(value, list | tuple):
        return False
    return all(isinstance(item, _PLAIN) or _is_plain(item) for item in value)


def users_level() -> int:
    """The ``stacklevel`` of a warning of the caller's that points to the user's own line.

    How many frames are between them depends: tracing has some of its own.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _OURS(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def positive(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a positive finite number, or None."""
    if value is None:
        return
    if not _is_real(value) or not (0 < value < math.inf):
        raise ValueError(f"{name}={described(value)}: expected a positive finite number")


def non_negative(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a finite number of at least 0."""
    if not _is_real(value) or not (0 <= value < math.inf):
        raise ValueError(f"{name}={described(value)}: expected a number of at least 0")


def fraction(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a number in [0, 1)."""
    if not _is_real(value) or not (0 <= value < 1):
        raise ValueError(f"{name}={described(value)}: expected a number in [0, 1)")


def proper_fraction(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a number in (0, 1)."""
    if not _is_real(value) or not (0 < value < 1):
        raise ValueError(f"{name}={described(value)}: expected a number in (0, 1)")


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises a ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={described(value)}: expected a whole number of at least {least}")


def finite(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a finite number."""
    if not _is_real(value) or not math.isfinite(value):
        raise ValueError(f"{name}={described(value)}: expected a finite number")


def choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={described(value)}: expected one of {', '.join(choices)}")


def seed(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a seed that torch's generators take."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{name}={described(value)}: expected a whole number in 0..2**63-1")
