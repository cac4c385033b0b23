"""The largest learning rate of each group of an optimizer, that a scheduler's is a share of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["PEAK", "at_peak", "peak_of", "raise_peaks", "share_of_peak"]

#: A group's entry for it, which is saved with the group.
PEAK = "peak_lr"


def _largest(values: Sequence[float | Tensor]) -> float | Tensor:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return max(values)
    like = tensors[0]
    numbers = [torch.as_tensor(v, dtype=like.dtype, device=like.device).reshape(()) for v in values]
    return torch.stack(numbers).amax().detach()


def peak_of(group: dict[str, Any]) -> float | Tensor:
    """The largest "lr" that a group has had or was told of; 1 where it has none.

    A scheduler tells it: "initial_lr", and OneCycleLR "max_lr".
    """
    if "lr" not in group:
        return 1.0
    names = ["lr", "initial_lr", PEAK]
    if {"initial_lr", "min_lr"} <= set(group):  # OneCycleLR writes both
        names.append("max_lr")
    return _largest([group[name] for name in names if name in group])


def raise_peaks(optimizer: Optimizer) -> float | Tensor:
    """Brings the groups' `PEAK` up to date; returns how many times the largest rise was (1: none).

    A rise from 0 doesn't count.
    """
    rises: list[float | Tensor] = [1.0]
    for group in optimizer.param_groups:
        if "lr" not in group:
            continue
        before, group[PEAK] = group.get(PEAK), peak_of(group)
        if isinstance(before, Tensor) or before:
            rise = group[PEAK] / before
            rises.append(rise.nan_to_num(1.0, 1.0) if isinstance(rise, Tensor) else rise)
    return _largest(rises)


def share_of_peak(group: dict[str, Any]) -> float | Tensor:
    """lr/peak of a group, 0 to 1."""
    if "lr" not in group:
        return 1.0
    lr, peak = group["lr"], group[PEAK]
    if isinstance(peak, Tensor):
        return torch.where(peak == 0, 0.0, torch.as_tensor(lr).to(peak.device) / peak)
    return lr / peak if peak else 0.0


@contextmanager
def at_peak(optimizer: Optimizer) -> Iterator[None]:
    """Inside, every group's "lr" is its `PEAK`."""
    before = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    try:
        for group, lr in before:
            peak = group[PEAK]
            group["lr"] = peak if not isinstance(lr, Tensor) else peak.clone().reshape(lr.shape)
        yield
    finally:
        for group, lr in before:
            group["lr"] = lr
