"""Training on several ranks: who shares the parameters, and the one exchange a step among them.

Under DDP every rank holds all parameters, and all gradients are the mean over the ranks by the
time the closure returns: every rank computes the same. Under FSDP2 every rank holds shards, and
sums over all elements are sums over the ranks. Either way a step exchanges one small vector, which
also says whether all ranks got through: see docs/distributed.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lyapcuda.arguments import described
from lyapcuda.params.shards import fsdp_modules, is_sharded

__all__ = ["GRACE", "RankError", "Ranks", "is_wrapper"]


class RankError(RuntimeError):
    """Raised on a rank because of another one: it failed, or its gradients weren't averaged."""


#: How long a rank whose closure failed waits for the others, to tell them.
GRACE = timedelta(seconds=10)


class Ranks:
    """The ranks that share one set of parameters.

    Everything here is collective: all ranks call it, in the same order. It goes through a process
    group of our own, so that a rank which fails can't be mistaken for one that takes part in the
    user's collectives.

    Args:
        like: a process group of the user's, whose backend and timeout ours has.
        ranks: global ranks.
        owners: for each of them, in order, the index of the first that holds the same elements.
    """

    def __init__(self, like: Any, ranks: Sequence[int], owners: Sequence[int]) -> None:
        self._like, self._ranks, self._owners = like, tuple(ranks), tuple(owners)
        self._wrappers: list[DistributedDataParallel] = []
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._late: tuple[Tensor, Any] | None = None

    @classmethod
    def of_mesh(cls, tensors: Sequence[Tensor]) -> Ranks | None:
        """Those of DTensor parameters; None where there is one rank, or no DTensor at all.

        Raises:
            ValueError: DTensors beside plain tensors, on several meshes, or placed otherwise than
                by FSDP2 (sharded or replicated, all of them along the same mesh dimensions).
        """
        sharded = [t for t in tensors if is_sharded(t)]
        if not sharded:
            return None
        if len(sharded) != len(tensors):
            raise ValueError(
                f"params: {len(sharded)} of {len(tensors)} parameters are DTensors; all or none "
                "can be tracked together (fully_shard's ignored_params have no mesh)"
            )
        from torch.distributed.tensor import Replicate, Shard

        mesh, kinds = sharded[0].device_mesh, None
        for tensor in sharded:
            placed = tuple(type(p) for p in tensor.placements)
            kinds = placed if kinds is None else kinds
            if tensor.device_mesh != mesh or placed != kinds:
                raise ValueError(
                    "params: DTensors on several meshes, or with placements of several kinds "
                    f"({tensor.placements} beside {sharded[0].placements}), aren't supported"
                )
            if any(kind not in (Shard, Replicate) for kind in placed):
                raise ValueError(f"params: a DTensor with placements {tensor.placements}")
        ranks = mesh.mesh.flatten().tolist()
        if len(ranks) == 1:
            return None
        # The same place along the sharded dimensions, the first along the replicated ones.
        index = torch.arange(len(ranks)).view(mesh.mesh.shape)
        for dim, kind in enumerate(kinds):
            if kind is Replicate:
                index = index.narrow(dim, 0, 1).expand_as(mesh.mesh)
        return cls(mesh.get_group(0), ranks, index.flatten().tolist())

    @classmethod
    def of_replicas(cls, group: Any, modules: Sequence[nn.Module]) -> Ranks | None:
        """Those of plain parameters, which all ranks have: of ``group``, or of the
        DistributedDataParallel among the modules. None where there is one rank.

        Raises:
            ValueError: modules in several DistributedDataParallel with different groups.
            NotImplementedError: flat parameters of FullyShardedDataParallel (FSDP1).
        """
        flat = [m for m in modules if type(m).__name__ == "FullyShardedDataParallel"]
        if flat:
            raise NotImplementedError(
                "params: parameters of FullyShardedDataParallel (FSDP1) are not supported; FSDP2's "
                "(torch.distributed.fsdp.fully_shard) are"
            )
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError(
                    f"process_group={described(group)}: torch.distributed isn't initialised"
                )
            return None
        wrappers = [m for m in modules if isinstance(m, DistributedDataParallel)]
        if group is None:
            groups = {tuple(dist.get_process_group_ranks(w.process_group)) for w in wrappers}
            if len(groups) > 1:
                raise ValueError(
                    "process_group=None: the parameters are in DistributedDataParallel modules "
                    f"over different ranks, {sorted(groups)}"
                )
            group = wrappers[0].process_group if wrappers else None
        if group is None or dist.get_world_size(group) == 1:
            return None
        found = cls(group, dist.get_process_group_ranks(group), [0] * dist.get_world_size(group))
        found._wrappers = wrappers
        return found

    @property
    def sharded(self) -> bool:
        """Whether the ranks hold different elements."""
        return len(set(self._owners)) > 1

    @property
    def shard(self) -> int:
        """A number for the elements that this rank holds; 0 where all hold the same."""
        return self._owners[self._ranks.index(dist.get_rank())]

    def __getstate__(self) -> dict[str, Any]:
        # Process groups can't be copied; ours is found again by the ranks.
        return {**self.__dict__, "_like": None, "_wrappers": [], "_late": None}

    # --- collectives -----------------------------------------------------------------------------

    def _gather(self, message: Tensor, timeout: timedelta | None = None) -> Tensor:
        """(ranks, n): everyone's message of n numbers."""
        rows = message.new_empty(len(self._ranks), message.numel())
        options = dist.distributed_c10d.AllgatherOptions()
        if timeout is not None:
            options.timeout = timeout
        group = _own_group(self._like, self._ranks, message.device)
        group.allgather([list(rows.unbind())], [message], options).wait()
        return rows

    def _total(self, rows: Tensor) -> Tensor:
        """Over the ranks that hold different elements, added in their order: the same bits
        everywhere."""
        return rows[self._rows_of(rows.device)[1]].cumsum(0)[-1]

    def _rows_of(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of rows: for every rank the owner of its elements, and all owners. Made once, so
        that no step waits for them.
        """
        if device not in self._indices:
            both = (self._owners, sorted(set(self._owners)))
            self._indices[device] = tuple(torch.tensor(rows, device=device) for rows in both)
        return self._indices[device]

    def sum(self, part: Tensor) -> Tensor:
        """Sums over all elements from those over this rank's. What replicas have is the sum."""
        if not self.sharded:
            return part
        return self._total(self._gather(part.flatten())).view(part.shape)

    def exchange(
        self, sums: Sequence[Tensor], losses: Tensor, *, now: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """The exchange of a step.

        Args:
            sums: float64, over the elements that this rank holds.
            losses: float64, this rank's.
            now: wait for the device, and raise here on CUDA too.

        Returns:
            The sums over all elements, and losses that are finite only where everyone's are.

        Raises:
            RankError: on all ranks, where one called `fail`, or where replicas have different
                sums. On CUDA nothing is read back: the sums are NaN then, and `check` raises later.
        """
        parts = [part.flatten() for part in sums]
        rows = self._gather(torch.cat([losses.new_zeros(1), losses, *parts]))
        failed, everyones = rows[:, 0], rows[:, 1 : 1 + losses.numel()]
        rows = rows[:, 1 + losses.numel() :]
        twins = rows[self._rows_of(rows.device)[0]]
        apart = ((rows != twins) & ~(rows.isnan() & twins.isnan())).any(1)
        status = torch.where(failed != 0, failed, 2.0 * apart)
        self._heed(status, now)
        total = torch.where(status.any(), math.nan, self._total(rows))
        split = total.split([part.numel() for part in parts])
        views = [piece.view(part.shape) for piece, part in zip(split, sums, strict=True)]
        return views, everyones.mean(0)

    def fail(self, numbers: int, device: torch.device) -> None:
        """What a rank calls instead of `exchange` when its closure raised: the others then raise
        too, if they get to their exchange within `GRACE`.

        Args:
            numbers: losses and sums that the exchange would have had.
            device: of those.
        """
        message = torch.full((1 + numbers,), math.nan, dtype=torch.float64, device=device)
        message[0] = 1.0
        # Where it can't: they are gone, or wait for us in a collective of the closure's, which ends
        # with our process, or with the timeout of their group.
        with suppress(Exception):
            self._gather(message, GRACE)

    @staticmethod
    def reads_back(device: torch.device) -> bool:
        """Whether decisions are read on the host as they fall: where nothing waits for that."""
        return device.type == "cpu"

    def _heed(self, status: Tensor, now: bool) -> None:
        if now or self.reads_back(status.device):
            self._raise(status)
            return
        late = torch.empty(status.shape, dtype=status.dtype, pin_memory=True)
        late.copy_(status, non_blocking=True)
        event = torch.get_device_module(status.device).Event()
        event.record()
        self._late = (late, event)

    def _raise(self, status: Tensor) -> None:
        for rank, code in zip(self._ranks, status.tolist(), strict=True):
            if code == 1.0:
                raise RankError(
                    f"rank {rank} failed in this step (its own error says how): nothing was "
                    "measured, and parameters, gradients and the tracker are as they were"
                )
            if code:
                raise RankError(
                    f"rank {rank} has another gradient than its replica, so nothing was measured: "
                    "was it averaged over the ranks (no backward() under no_sync() alone)?"
                )

    def check(self) -> None:
        """At the start of a step: what an exchange on CUDA has found since, and DDP's mode.

        Raises:
            RuntimeError: see there; inside of DDP's ``no_sync()`` or ``join()``.
        """
        if self._late is not None and self._late[1].query():
            status, self._late = self._late[0], None
            self._raise(status)
        for wrapper in self._wrappers:
            if not wrapper.require_backward_grad_sync:
                raise RuntimeError(
                    "tracker.step inside no_sync(): its gradients wouldn't be averaged over the "
                    "ranks; use no_sync() inside the closure, for all but its last backward()"
                )
            if wrapper._join_config.enable:
                raise RuntimeError("tracker.step inside join(): every rank has to take every step")

    def agree(self, values: Mapping[str, float], device: torch.device) -> None:
        """Raises a ValueError, on all ranks, where an argument isn't the same on all."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        rows = self._gather(numbers).T.tolist()
        for name, row in zip(values, rows, strict=True):
            if len(set(row)) > 1:
                raise ValueError(f"{name}: differs between the ranks: {row}")

    def replicate_(self, tensor: Tensor) -> None:
        """Writes what the first rank has to all others'."""
        group = _own_group(self._like, self._ranks, tensor.device)
        dist.broadcast(tensor, group=group, group_src=0)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module sees to the ranks' collectives: DDP's, FSDP2's."""
    return isinstance(module, DistributedDataParallel) or bool(fsdp_modules([module]))


_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _own_group(like: Any, ranks: tuple[int, ...], device: torch.device) -> Any:
    """A process group of our own, made once for every set of ranks."""
    world, group = _groups.get(ranks, (None, None))
    if world is not dist.group.WORLD:  # none yet, or torch.distributed was initialised again
        like = dist.group.WORLD if like is None else like
        group = dist.new_group(
            list(ranks),
            timeout=like._get_backend(device).options._timeout,
            backend=dist.get_backend_config(like),
            use_local_synchronization=True,
        )
        _groups[ranks] = (dist.group.WORLD, group)
    return group
