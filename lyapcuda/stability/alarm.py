"""Calls back where the edge of stability is crossed upwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["EdgeAlarm"]


class EdgeAlarm:
    """A step hook of a tracker: calls ``callback(tracker)`` when its edge rises above a value.

    It is called again once the edge has been at or below the value in between. Reads one number
    back at every measurement.

    Args:
        callback: takes the tracker.
        above: the value.
    """

    def __init__(self, callback: Callable[[Any], None], above: float) -> None:
        self._callback, self._above, self._was_above = callback, above, False

    def __call__(self, tracker: Any) -> None:
        is_above = float(tracker.edge) > self._above
        rises, self._was_above = is_above and not self._was_above, is_above
        if rises:
            self._callback(tracker)
