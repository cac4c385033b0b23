"""How many samples a minibatch holds, and its two parts."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lyapcuda.arguments import proper_fraction

__all__ = ["batch_size", "split_batch", "tensors_of"]


def batch_size(batch: Any, name: str) -> int:
    """How many samples a batch holds; ``name`` is the argument that an error names.

    That is the length of its first tensor, unless this lies in a list of samples: one beside a list
    of mappings of the same length (images and their targets), or one whose tensors differ in
    length, beside others of the list's length.
    """
    count = _listed(batch)
    if count is not None:
        return count
    first = _first_tensor(batch)
    if first is None or first.dim() == 0:
        raise ValueError(
            f"{name}: found no tensor with a batch dimension in a {type(batch).__name__}, so its "
            "size, which weights it, is unknown; say it by sizes= (split_batch: cut it yourself)"
        )
    return len(first)


def split_batch(batch: Any, fraction: float = 0.1) -> tuple[Any, Any]:
    """Cuts a minibatch in two along its first dimension: (the rest, the part to measure).

    Args:
        batch: a tensor, or tuples, lists, mappings and dataclasses of them, all of one length.
            Every container stays of its type. Lists of as many samples (file names, images of
            their own shapes) are cut too; what holds no samples (numbers, strings, None, tensors
            of no dimension) is in both parts.
        fraction: the second part's share, in (0, 1); at least one sample, and one is left.

    Raises:
        ValueError: no tensors, tensors of different lengths, fewer than two samples.

    Example:
        >>> rest, part = split_batch((torch.arange(10), torch.arange(10)), fraction=0.2)
        >>> part
        (tensor([8, 9]), tensor([8, 9]))
    """
    proper_fraction("fraction", fraction)
    size = batch_size(batch, "batch")
    if size < 2:
        raise ValueError(f"batch: {size} sample can't be cut in two")
    cut = size - min(max(round(size * fraction), 1), size - 1)
    return _slice(batch, slice(0, cut), size), _slice(batch, slice(cut, size), size)


# --- sizes -------------------------------------------------------------------------------------


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _members(batch: Any) -> Iterable[Any]:
    """What a container holds; nothing, where it is none."""
    if isinstance(batch, Mapping):
        return batch.values()
    if _is_record(batch):
        return [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    if isinstance(batch, str | bytes | Tensor) or not isinstance(batch, Iterable):
        return ()
    return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for member in _members(batch):
        yield from tensors_of(member)


def _first_tensor(batch: Any) -> Tensor | None:
    return next(tensors_of(batch), None)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and not hasattr(value, "_fields") and len(value) > 0


def _listed(batch: Any) -> int | None:
    """The number of samples where a batch has them in lists; None where it has tensors of them."""
    if isinstance(batch, Tensor) or isinstance(batch, str | bytes):
        return None
    members = list(_members(batch))
    first = next((m for m in members if _first_tensor(m) is not None), None)
    if not _is_list(first):
        return None if first is None or isinstance(first, Tensor) else _listed(first)
    count = len(first)
    if not all(isinstance(m, Tensor | Mapping) for m in first):
        return _listed(first)
    beside = [m for m in members if m is not first and _has_length(m)]
    if any(len(m) != count for m in beside) or not beside:
        return None
    mappings = any(_is_list(m) and all(isinstance(s, Mapping) for s in m) for m in [first, *beside])
    lengths = {len(t) for t in tensors_of(batch) if t.dim()}
    return count if mappings or len(lengths) > 1 else None


def _has_length(value: Any) -> bool:
    return _is_list(value) or isinstance(value, Tensor) and value.dim() > 0


# --- parts -------------------------------------------------------------------------------------


def _slice(batch: Any, span: slice, size: int) -> Any:
    """A container's part of ``size`` samples; what holds none stays what it is."""
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim == 0:
            return batch
        if len(batch) != size:
            kind = "a tensor" if isinstance(batch, Tensor) else "an array"
            raise ValueError(f"batch: {kind} of shape {tuple(batch.shape)} beside {size} samples")
        return batch[span]
    if isinstance(batch, Mapping):
        return _slice_mapping(batch, span, size)
    if _is_record(batch):
        names = [f.name for f in dataclasses.fields(batch) if f.init]
        return dataclasses.replace(
            batch, **{name: _slice(getattr(batch, name), span, size) for name in names}
        )
    if isinstance(batch, list | tuple):
        return _slice_sequence(batch, span, size)
    if _is_scalar(batch):
        return batch
    raise ValueError(f"batch: can't cut a {type(batch).__name__}; cut the batch yourself")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | Number | np.generic | Path)


def _slice_sequence(batch: Sequence[Any], span: slice, size: int) -> Any:
    lengths = {len(t) for t in tensors_of(batch) if t.dim()}
    if len(batch) == size and lengths != {size} and not hasattr(batch, "_fields"):
        return type(batch)(batch[span])  # a list of samples
    if not lengths and batch and not hasattr(batch, "_fields") and all(map(_is_scalar, batch)):
        raise ValueError(f"batch: a {type(batch).__name__} of {len(batch)} beside {size} samples")
    parts = [_slice(value, span, size) for value in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _slice_mapping(batch: Mapping[Any, Any], span: slice, size: int) -> Any:
    if isinstance(getattr(batch, "batch_size", None), torch.Size) and batch.batch_size:
        return batch[span]  # a TensorDict, which cuts itself
    parts = {name: _slice(value, span, size) for name, value in batch.items()}
    if type(batch) is dict:
        return parts
    for make in (_copied, _constructed):
        try:
            made = make(batch, parts)
        except Exception:  # a type that can't be made this way
            continue
        if _holds(made, batch, parts):
            return made
    raise ValueError(
        f"batch: can't make a {type(batch).__name__} of a part of one; pass a dict, or cut it "
        "yourself"
    )


def _copied(batch: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    made = copy.copy(batch)
    for name, part in parts.items():
        made[name] = part
    return made


def _constructed(batch: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    return type(batch)(parts)


def _holds(made: Any, batch: Mapping[Any, Any], parts: dict[Any, Any]) -> bool:
    """Whether a mapping has the parts, also as attributes where the whole had its own so."""
    if set(made) != set(parts) or any(made[name] is not part for name, part in parts.items()):
        return False
    whole = {name: batch[name] for name in batch if isinstance(name, str)}
    own = [n for n, value in whole.items() if getattr(batch, n, made) is value]
    return all(getattr(made, name, None) is parts[name] for name in own)
