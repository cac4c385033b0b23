"""The examples of distributed.md and fsdp2.md run, on two ranks; the exchange is counted."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import torch

import lyapcuda
from ranks import on_ranks
from wrapped_nets import loss_of, setting

DOCS = Path(__file__).parents[2] / "docs"


def run(page: str, least: int) -> tuple[dict, str]:
    """(the names that a page's blocks leave, what they print); there are ``least``."""
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)
    assert len(blocks) >= least
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks:
            exec(compile(block, f"docs/{page}", "exec"), names)
    return names, printed.getvalue()


def examples(rank: int, folder: str) -> None:
    os.chdir(folder)
    watch = run("howto/fsdp2.md", 1)[0]["watch"]
    assert int(watch.steps) == 3 and 0 < watch.edge < 1  # Adam has no P before its first step
    names, printed = run("distributed.md", 5)
    assert "DTensor" in printed and "RankError" not in printed
    tracker, resumed = names["tracker"], names["resumed"]
    assert int(resumed.steps) == 5 and torch.equal(tracker.h, resumed.h)


def exchanges(rank: int) -> None:
    """(numbers a rank) of every exchange of a step, after the first."""
    sent: list[int] = []
    gather = lyapcuda.params.ranks.Ranks._gather

    def counted(self, message, timeout=None):
        sent.append(message.numel())
        return gather(self, message, timeout)

    lyapcuda.params.ranks.Ranks._gather = counted
    try:
        for how in ("ddp", "fsdp"):
            for options, numbers in (
                ({}, 7 + 2**2),
                ({"k": 8}, 14 + 16**2),
                ({"k": 2, "momentum": 0.5}, 8 + 6**2),
                ({"k": 3, "which": "BE"}, 9 + 4**2 + 2**2),
            ):
                model, x, y, tracker = setting(rank, how, **options)
                for _ in range(3):
                    sent.clear()
                    tracker.step(lambda m=model, x=x, y=y: loss_of(m, x, y))
                assert sent == [numbers], f"{how} {options}: {sent}"
    finally:
        lyapcuda.params.ranks.Ranks._gather = gather


def on_two(rank: int, folder: str) -> None:
    examples(rank, folder)
    exchanges(rank)


def test_the_examples_run_and_the_exchange_is_as_described(tmp_path):
    on_ranks(2, on_two, str(tmp_path))
