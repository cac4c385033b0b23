"""Checks of arguments; every error names the argument and its value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def positive(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a positive finite number, or None."""
    if value is None:
        return
    if not _is_real(value) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r}: expected a positive finite number")


def non_negative(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a finite number of at least 0."""
    if not _is_real(value) or not (0 <= value < math.inf):
        raise ValueError(f"{name}={value!r}: expected a number of at least 0")


def fraction(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a number in [0, 1)."""
    if not _is_real(value) or not (0 <= value < 1):
        raise ValueError(f"{name}={value!r}: expected a number in [0, 1)")


def proper_fraction(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a number in (0, 1)."""
    if not _is_real(value) or not (0 < value < 1):
        raise ValueError(f"{name}={value!r}: expected a number in (0, 1)")


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raises a ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def seed(name: str, value: Any) -> None:
    """Raises a ValueError unless ``value`` is a seed that torch's generators take."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{name}={value!r}: expected a whole number in 0..2**63-1")
