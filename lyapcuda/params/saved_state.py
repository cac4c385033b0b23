"""Checks of a saved state before any of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda.params.shards import local


def require_entries(saved: Any, *names: str, of: str | None = None) -> None:
    """Raises a ValueError where a state_dict lacks one of its entries; ``of`` names its owner."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"state_dict: expected a dictionary, got a {type(saved).__name__}")
    missing = sorted(set(names) - set(saved))
    if missing:
        what = "incomplete" if of is None else f"not the state of {of}"
        raise ValueError(f"state_dict: {what}, it lacks {missing}")


def require_list(name: str, saved: Any, kind: type | tuple[type, ...]) -> None:
    """Raises a ValueError where an entry is no list of that kind."""
    if not isinstance(saved, list | tuple):
        raise ValueError(f"state_dict: {name} is a {type(saved).__name__}, expected a list")
    for item in saved:
        if not isinstance(item, kind):
            raise ValueError(f"state_dict: {name} holds a {type(item).__name__}")


def check_finite(name: str, saved: Sequence[Tensor | None]) -> None:
    """Raises a ValueError where saved tensors hold something that isn't finite. Waits for them."""
    if not all(t is None or bool(torch.isfinite(local(t)).all()) for t in saved):
        raise ValueError(f"state_dict: {name} isn't finite everywhere: it is damaged")


def check_shapes(name: str, have: Sequence[Tensor | None], saved: Sequence[Tensor | None]) -> None:
    """Raises a ValueError where saved tensors are of other shapes or dtypes than ours."""
    require_list(name, saved, (Tensor, type(None)))

    def describe(tensor: Tensor | None) -> str:
        return "-" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"

    advice = "it belongs to another model"
    if len(have) != len(saved):
        raise ValueError(
            f"state_dict: {name} holds {len(saved)} tensors, but these parameters need "
            f"{len(have)}: {advice}"
        )
    for theirs, mine in zip(map(describe, saved), map(describe, have), strict=True):
        if theirs != mine:
            raise ValueError(
                f"state_dict: {name} holds {theirs}, but these parameters need {mine}: {advice}"
            )
