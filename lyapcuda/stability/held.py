"""Which of an optimizer's groups hold the tracked parameters, and their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyapcuda.params.shards import local

__all__ = ["Held", "held_by", "several"]

#: Names in a message.
_SHOWN = 3


@dataclass(frozen=True)
class Held:
    """Tracked parameters in one of an optimizer's groups.

    Attributes:
        group: the optimizer's group, with its present numbers.
        positions: of each parameter in `FlatLayout.parameters`.
        states: of each parameter, its state in the optimizer; empty before its first step.
    """

    group: Mapping[str, Any]
    positions: list[int]
    states: list[Mapping[str, Any]]

    def numbers(self, key: str) -> Tensor:
        """A number of every state ("step"), as a float64 vector on the device that has them."""
        found = [torch.as_tensor(local(state[key])).detach() for state in self.states]
        return torch.stack([number.reshape(()).to(found[0].device) for number in found]).double()

    def tensors(self, key: str) -> list[Tensor]:
        """A tensor of every state: of DTensors this rank's part."""
        return [local(state[key]).detach() for state in self.states]

    def where(self, keep: Callable[[Mapping[str, Any]], bool]) -> Held:
        """Those of the parameters whose state is one to keep."""
        rows = [i for i, state in enumerate(self.states) if keep(state)]
        return Held(self.group, [self.positions[i] for i in rows], [self.states[i] for i in rows])


def held_by(optimizer: Any, position: Mapping[int, int]) -> Iterator[Held]:
    """The optimizer's groups that hold any of the parameters, in the optimizer's order.

    Args:
        optimizer: whose groups.
        position: of every parameter in `FlatLayout.parameters`, by the tensor's id.
    """
    for group in optimizer.param_groups:
        members = [tensor for tensor in group["params"] if id(tensor) in position]
        if members:
            # .get: an optimizer's state makes an entry for whatever it is asked for.
            states = [optimizer.state.get(tensor, {}) for tensor in members]
            yield Held(group, [position[id(tensor)] for tensor in members], states)


def several(names: Sequence[str]) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
