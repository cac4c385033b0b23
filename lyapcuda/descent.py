"""The step of an optimizer, group by group, on the compiled ops."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda import ops
from lyapcuda.params.flat import FlatGroup
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.shards import local, whole
from lyapcuda.tracker import CurvatureTracker

__all__ = ["BUFFER", "Descent"]

#: A parameter's momentum in the optimizer's state, as torch.optim.SGD names it.
BUFFER = "momentum_buffer"


class _Part:
    """The parameters of a flat group that take part in a step, as the ops take them."""

    def __init__(self, place: int, group: FlatGroup, indices: list[int]) -> None:
        self.place, self.group = place, group
        self.tensors = [group.tensors[i] for i in indices]
        self.offsets = [group.offsets[i] for i in indices]
        self.theta = group.segments_at(indices, self.tensors)
        self.gradients = group.segments_at(indices, [p.grad for p in self.tensors])
        self.rate: dict[str, float] = {}
        self.options: dict[str, Any] = {}

    def write_back(self) -> None:
        for tensor, segment in zip(self.tensors, self.theta, strict=True):
            held = local(tensor)
            if segment.data_ptr() != held.data_ptr():  # not dense: it was a copy
                held.copy_(segment.view_as(held))


class Descent:
    """Steps against the gradients in ``.grad``, at the rates of a tracker's curvatures.

    Holds the flat buffers of the momentum.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, list[Tensor]]] = {}  # by place in the layout

    def take(
        self,
        tracker: CurvatureTracker,
        state: Tensor,
        optimizer: Optimizer,
        overflow: Tensor | None = None,
    ) -> Tensor | None:
        """Takes a step; nothing is read back to the host.

        Args:
            tracker: whose layout and directions are used.
            state: its state, or a copy with other values.
            optimizer: whose groups say how, and whose state gets the `BUFFER` of every parameter
                with momentum.
            overflow: a number above 0 where there must be no step.

        Returns:
            The rates of the first group (see the ops); None where there is no gradient at all.
        """
        parts = []
        for place, group in enumerate(tracker.layout.groups):
            # A parameter frozen since stays.
            indices = [
                i for i, p in enumerate(group.tensors) if p.requires_grad and p.grad is not None
            ]
            if indices:
                group.check()
                parts.append(_Part(place, group, indices))
                self._set_up(parts[-1], optimizer, overflow)
        if not parts:
            return None
        if tracker.k == 1:
            rates = [self._plain(part, state) for part in parts]
        else:
            panels, ranks = tracker.separations.stepped, tracker.layout.ranks
            rates = self._panels(parts, state, panels, ranks)
        for part in parts:
            part.write_back()
        return rates[0]

    def _set_up(self, part: _Part, optimizer: Optimizer, overflow: Tensor | None) -> None:
        device, settings = part.group.device, optimizer.param_groups[part.group.number]
        part.options["weight_decay"] = float(settings["weight_decay"])
        if settings["momentum"]:
            part.options["momentum"] = float(settings["momentum"])
            part.options["nesterov"] = bool(settings["nesterov"])
            part.options["buffer"] = self._buffer(part, optimizer.state)
        lr, factor = settings["lr"], None
        if isinstance(lr, Tensor):
            lr, factor = 1.0, lr.detach().to(device, torch.float64)
        if overflow is not None:
            go = torch.where(overflow.to(device) == 0, 1.0, math.nan).double()
            factor = go if factor is None else factor * go
        if factor is not None:
            part.options["factor"] = factor.reshape(1)
        part.rate = {"gain": float(lr), "max_lr": float(settings["max_lr"])}

    def _buffer(self, part: _Part, state: MutableMapping[Tensor, dict[str, Any]]) -> Tensor:
        """The flat buffer whose views are the parameters' momentum."""
        group = part.group
        if part.place not in self._buffers:
            flat = group.new_buffer()
            views = zip(group.views(flat), group.tensors, strict=True)
            self._buffers[part.place] = flat, [whole(view, like) for view, like in views]
        flat, views = self._buffers[part.place]
        for p, view in zip(group.tensors, views, strict=True):
            held = state[p].get(BUFFER)
            if held is view:
                continue
            if held is not None and local(held).data_ptr() != local(view).data_ptr():
                local(view).copy_(local(held))  # loaded, or of another layout
            state[p][BUFFER] = view
        return flat

    def _plain(self, part: _Part, state: Tensor) -> Tensor:
        beside = {"offsets": part.offsets} if "buffer" in part.options else {}
        call = (part.theta, part.gradients, state.to(part.group.device))
        return ops.descend_(*call, **part.rate, **part.options, **beside)

    def _panels(
        self, parts: list[_Part], state: Tensor, panels: list[Tensor], ranks: Ranks | None
    ) -> list[Tensor]:
        calls, slopes = [], 0.0
        for part in parts:
            here = state.to(part.group.device)
            call = (part.theta, part.gradients, part.offsets, panels[part.place], here)
            slopes = slopes + ops.panel_slopes_(*call, **part.options).to(state.device)
            calls.append(call)
        slopes = slopes if ranks is None else ranks.sum(slopes)
        return [
            ops.panel_descend_(*call, slopes.to(part.group.device), **part.rate, **part.options)
            for part, call in zip(parts, calls, strict=True)
        ]
