"""Timing on a GPU within a budget: events, warm-up, medians, caches kept cold.

A rehearsal runs everything on the CPU and makes the times up.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gpu.lines import Lines

Call = Callable[[], object]
#: Data of one measurement is at least this, in turns, so that no cache holds it (an H200: 60 MB).
COLD = 512e6
#: Clock cycles that the device waits before a queue of calls, so that the host gets ahead: about a
#: millisecond.
HEAD_START = 2_000_000


class Bench:
    """What the sections measure with, and where their rows go."""

    def __init__(self, lines: Lines, rehearse: bool) -> None:
        self._lines, self.rehearse = lines, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self._made_up = 1e-3

    def row(self, table: str, **values: Any) -> None:
        """A measurement, at once."""
        self._lines.write("row", table=table, **values)
        print(table, values, flush=True)

    def note(self, text: str) -> None:
        self._lines.write("note", text=text)
        print(text, flush=True)

    def room(self, label: str, seconds: float, size: float) -> bool:
        """Whether there are so many seconds and bytes of device memory left; a note where not."""
        lacking = None
        if self._lines.left() < seconds and not self.rehearse:
            lacking = "time"
        elif size > self._free():
            lacking = "memory"
        if lacking:
            self.note(f"{label}: left out, no {lacking}")
        return lacking is None

    def most(self, part: float, least: float) -> float:
        """A part of the seconds that are left."""
        return max(least, part * min(self._lines.left(), 60.0))

    def _free(self) -> float:
        return 1e8 if self.rehearse else float(torch.cuda.mem_get_info()[0])

    def release(self) -> None:
        """Gives memory that is no longer used back to the device."""
        gc.collect()
        if not self.rehearse:
            torch.cuda.empty_cache()

    def sets(self, size: float) -> int:
        """How many sets of `size` bytes take turns so that the next one isn't in a cache."""
        return 2 if self.rehearse else max(1, min(64, int(COLD // max(size, 1.0)) + 1))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for the shapes at hand."""
        backend = "aot_eager" if self.rehearse else "inductor"
        return torch.compile(function, dynamic=False, backend=backend)

    def seconds(self, calls: Sequence[Call], most: float, queue: int) -> float:
        """Median seconds of a call on the device; the calls take turns, ``queue`` at a time.

        Several of them wait for the device, so that the gaps between launches don't count unless
        launching is what takes the time. A single one counts with its gaps, from its first launch
        on. At least two queues are timed, unless they take ``most`` seconds more than planned.
        """
        turns = itertools.cycle(calls)
        for _ in range(3 if queue > 1 else 1):
            next(turns)()
        if self.rehearse:
            self._made_up = 1e-3 + (self._made_up * 1.618) % 1e-3
            return self._made_up
        torch.cuda.synchronize()
        times: list[float] = []
        end = time.monotonic() + most
        while len(times) < 2 * queue or (time.monotonic() < end and len(times) < 2000):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(queue + 1)]
            if queue > 1:
                torch.cuda._sleep(HEAD_START)
            marks[0].record()
            for mark in marks[1:]:
                next(turns)()
                mark.record()
            torch.cuda.synchronize()
            times += [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks)]
            if time.monotonic() > end + most:  # slow ones: one queue does
                break
        return statistics.median(times)

    def compare(
        self, forms: Mapping[str, Sequence[Call]], most: float = 0.3, queue: int = 10
    ) -> tuple[dict[str, float], float]:
        """Median seconds of each form, in two rounds; and how far the rounds lie apart at most.

        A form that runs out of memory, or that torch.compile fails on, is left out, with a note.
        """
        rounds: dict[str, list[float]] = {}
        failed: set[str] = set()
        for _ in range(2):
            for name, calls in forms.items():
                if name in failed:
                    continue
                try:
                    rounds.setdefault(name, []).append(self.seconds(calls, most, queue))
                except Exception as error:
                    if name != "compiled" and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    failed.add(name)
                    rounds.pop(name, None)
                    self.note(f"{name} left out: {type(error).__name__}: {str(error)[:200]}")
                    self.release()
        spread = max((max(t) / min(t) - 1 for t in rounds.values()), default=0.0)
        return {name: statistics.median(t) for name, t in rounds.items()}, spread
