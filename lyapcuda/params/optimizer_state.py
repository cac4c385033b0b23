"""What a step of an optimizer changes beside the parameters, to be put back afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda.params.shards import local

__all__ = ["OptimizerState"]


class OptimizerState:
    """An optimizer's state, settings and attributes, as they are now.

    Tensors are copied, and put back where they lie. So are dictionaries and lists, and what they
    hold; objects of other kinds stay as a step leaves them. Memory: a copy of the state.

    Args:
        optimizer: whose; also of the optimizers that it wraps.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([p])
        >>> before = OptimizerState(optimizer)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> before.restore()
        >>> dict(optimizer.state)
        {}
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[dict[Any, Any] | list[Any], Any]] = []
        # Parameters belong to the user.
        self._seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._keep(optimizer)

    @torch.no_grad()
    def _keep(self, value: Any) -> None:
        if isinstance(value, Optimizer):
            value = value.__dict__
        if id(value) in self._seen or not isinstance(value, Tensor | dict | list | tuple):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            held = local(value)
            self._tensors.append((held, held.detach().clone()))
            return
        if not isinstance(value, tuple):
            self._containers.append((value, value.copy()))
        for item in list(value.values()) if isinstance(value, dict) else value:
            self._keep(item)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all of it back, bitwise."""
        for container, before in self._containers:
            if isinstance(container, list):
                container[:] = before
                continue
            for name in [name for name in container if name not in before]:
                del container[name]
            container.update(before)
        for held, value in self._tensors:
            held.copy_(value)
