"""Runs a function on several processes with a gloo group among them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server imports these once; a rank is then a fork of it, which takes milliseconds.
_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "lyapcuda",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


@dataclass
class Outcome:
    """What became of one rank: a value, the text of an error, or neither (it died or hung)."""

    value: Any = None
    error: str | None = None
    seconds: float = float("nan")
    exit_code: int | None = None


def _main(rank: int, size: int, folder: str, limit: float, pipe: Connection, call: tuple) -> None:
    torch.set_num_threads(1)
    function, args = call
    start = time.monotonic()
    try:
        store = dist.FileStore(os.path.join(folder, "store"), size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit)
        )
        outcome = Outcome(value=function(rank, *args))
    except BaseException:
        outcome = Outcome(error=traceback.format_exc())
    outcome.seconds = time.monotonic() - start
    pipe.send(outcome)
    pipe.close()
    os._exit(0)  # what a failed rank does: no goodbye to the others


def outcomes(
    size: int, function: Callable, *args: Any, limit: float = 60.0, deadline: float = 120.0
) -> list[Outcome]:
    """``function(rank, *args)`` on every rank.

    Args:
        limit: timeout of the process group, in seconds.
        deadline: after so many seconds, ranks that have not ended are killed.
    """
    ends = time.monotonic() + deadline
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_main, args=(rank, size, folder, limit, theirs, (function, args))
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = [Outcome() for _ in range(size)]
        open_pipes = dict(zip(pipes, range(size), strict=True))
        while open_pipes and time.monotonic() < ends:
            for pipe in wait(list(open_pipes), ends - time.monotonic()):
                rank = open_pipes.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    pass
        for process, outcome in zip(processes, found, strict=True):
            process.join(max(0.1, min(5.0, ends - time.monotonic())))
            if process.is_alive():
                process.kill()
                process.join()
            outcome.exit_code = process.exitcode
    return found


def on_ranks(size: int, function: Callable, *args: Any, **options: float) -> list[Any]:
    """The same, where no rank may fail: their values, in order."""
    found = outcomes(size, function, *args, **options)
    failed = {rank: o for rank, o in enumerate(found) if o.error or o.exit_code != 0}
    assert not failed, "\n".join(f"rank {r}: {o.error or o}" for r, o in failed.items())
    return [outcome.value for outcome in found]


def equal_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits. Collective."""
    tensor = tensor.flatten()
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return len({row.numpy().tobytes() for row in rows}) == 1


def folder_of(path: Path) -> str:
    """A folder that all ranks may write to."""
    path.mkdir(exist_ok=True)
    return str(path)
