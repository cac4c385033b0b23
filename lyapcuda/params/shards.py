"""Parameters that are DTensors, as FSDP2 makes them: the part of each that this rank holds.

torch.distributed.tensor takes seconds to import, so nothing here imports it unless a DTensor has
shown up, and then it is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "any_sharded",
    "compute_epsilon",
    "fsdp_modules",
    "in_place",
    "is_sharded",
    "local",
    "locals_of",
    "reset",
    "reshard",
    "shard_of",
    "whole",
]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there is a DTensor among them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, detached: all of a plain one. The same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # with grad mode on, to_local() is an op of autograd, ten times as slow
        return tensor.to_local().detach()


def locals_of(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """`local` of each; the sequence itself where all are plain."""
    if not any_sharded(tensors):
        return tensors
    return [tensor if tensor is None else local(tensor) for tensor in tensors]


def _placements(like: Tensor, rows: bool) -> list[Any]:
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + 1) if rows and isinstance(p, Shard) else p for p in like.placements]


def shard_of(tensor: Tensor, like: Tensor, *, rows: bool = False) -> Tensor:
    """This rank's part of ``tensor``, a whole one or a DTensor, cut as ``like`` is cut.

    Args:
        tensor: of the shape of ``like``; a plain one has to be the same on all ranks.
        like: a parameter. Where that is plain, the result is the whole tensor.
        rows: ``tensor`` has one more dimension, in front.
    """
    if not is_sharded(like):
        return tensor.full_tensor() if is_sharded(tensor) else tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    if not is_sharded(tensor):
        replicas = [Replicate()] * mesh.ndim
        tensor = DTensor.from_local(
            tensor.detach().to(local(like).device), mesh, replicas, run_check=False
        )
    return local(tensor.redistribute(mesh, _placements(like, rows)))


def whole(part: Tensor, like: Tensor, *, rows: bool = False) -> Tensor:
    """The DTensor of local part ``part``, laid out like ``like``; ``part`` for a plain one."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = (len(part), *like.shape) if rows else tuple(like.shape)
    return DTensor.from_local(
        part,
        like.device_mesh,
        _placements(like, rows),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


# --- FSDP2's modules -----------------------------------------------------------------------------


def fsdp_modules(modules: Sequence[nn.Module]) -> list[Any]:
    """Those that ``fully_shard`` was called on."""
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [m for m in modules if isinstance(m, module.FSDPModule)]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Frees gathered parameters: the next forward pass gathers the shards as they are then."""
    for module in fsdp_modules(modules):
        module.reshard()


def reset(modules: Sequence[nn.Module]) -> None:
    """The same after an exception, which may have come in the middle of a forward pass."""
    wrapped = fsdp_modules(modules)
    inner = {id(m) for outer in wrapped for m in outer.modules() if m is not outer}
    for module in wrapped:
        if id(module) not in inner and hasattr(module, "reset_iter_state"):  # from torch 2.13 on
            module.reset_iter_state()
    reshard(wrapped)


@contextmanager
def in_place(
    parameters: Sequence[Tensor], modules: Sequence[nn.Module]
) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """Gives a function that has DTensor parameters hold what it is called with, for a while.

    FSDP2 keeps references to its shards, so pointing a parameter elsewhere wouldn't reach what it
    gathers: the shards are written, and θ is put back from a copy, bitwise.
    """
    shards = [local(p).data for p in parameters]  # .data: no graph's saved tensors are at stake
    kept = [shard.clone() for shard in shards]

    def hold(copies: Sequence[Tensor]) -> None:
        for shard, copy in zip(shards, copies, strict=True):
            shard.copy_(copy)
        reshard(modules)

    try:
        yield hold
    except BaseException:
        reset(modules)
        raise
    finally:
        hold(kept)


def compute_epsilon(modules: Sequence[nn.Module]) -> float:
    """Machine epsilon of the coarsest type that FSDP2's mixed precision computes with; 0 if
    none."""
    epsilon = 0.0
    for module in fsdp_modules(modules):
        policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
        dtype = getattr(policy, "param_dtype", None)
        if dtype is not None:
            epsilon = max(epsilon, torch.finfo(dtype).eps)
    return epsilon
