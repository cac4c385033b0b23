"""What of the user's own a closure may count evaluations in: lists, dictionaries, meters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Held", "held_in"]

_CONTAINERS = (list, dict, set, deque)
_LIBRARIES = ("torch", "numpy", "builtins", "random")
# At most so many entries of one object are looked at.
_MOST = 1000


@dataclass(frozen=True)
class Held:
    """A length, or a number, as it was.

    Attributes:
        name: for messages.
        holder, key: where the number is; None as the key: the length of ``holder``.
        value: what it was.
    """

    name: str
    holder: Any
    key: Any
    value: int | float

    def now(self) -> Any:
        """What it is now."""
        return len(self.holder) if self.key is None else self.holder.get(self.key, self.value)

    def is_changed(self) -> bool:
        """Whether it is another one now."""
        now = self.now()
        return isinstance(now, int | float) and now != self.value and now == now

    @property
    def may_be_overwritten(self) -> bool:
        """Whether it may be the last loss, say, that each evaluation replaces, and no sum."""
        return isinstance(self.value, float)


def held_in(name: str, value: Any) -> Iterator[Held]:
    """Lengths and numbers in an object that a closure refers to, and in its attributes."""
    if isinstance(value, _CONTAINERS):
        yield Held(name, value, None, len(value))
        if isinstance(value, dict):
            yield from _numbers(name + "[{!r}]", value, value)
        return
    if isinstance(value, nn.Module | Tensor | torch.Generator) or callable(value):
        return
    if type(value).__module__.split(".")[0] in _LIBRARIES:
        return
    there = getattr(value, "__dict__", None)
    if isinstance(there, dict):
        # (Written for the first time, those of the class become the object's own.)
        yield from _numbers(name + ".{}", there, {**vars(type(value)), **there})
        for key, held in list(there.items())[:_MOST]:
            if isinstance(held, _CONTAINERS):
                yield Held(f"{name}.{key}", held, None, len(held))


def _numbers(form: str, there: dict[Any, Any], seen: dict[Any, Any]) -> Iterator[Held]:
    for key, held in list(seen.items())[:_MOST]:
        if isinstance(held, int | float) and not isinstance(held, bool):
            yield Held(form.format(key), there, key, held)
