"""Timing on a GPU within a budget, for gpu_sections.py: events, warm-up, medians, caches kept cold.

A rehearsal runs everything once on the CPU and makes the times up.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

#: Data of one measurement is at least this, in turns, so that no cache holds it (an H200: 60 MB).
COLD = 512e6


class Bench:
    """One section: its rows, what was left out, and how its table is written."""

    def __init__(self, out: Path, seconds: float, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.lines: list[str] = []
        self._made_up = 1e-3

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Whatever happens next, what was measured is in the file."""
        found = {"rows": self.rows, "notes": self.notes, "markdown": self.lines}
        unfinished = self.out.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(self.out)

    def head(self, *columns: str) -> None:
        """Starts a table."""
        self.lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]

    def row(self, cells: Sequence[str], **values: Any) -> None:
        """A line of the table, and the same with all digits."""
        self.rows.append(values)
        self.lines.append("| " + " | ".join(cells) + " |")
        print(self.lines[-1], flush=True)
        self.save()

    def note(self, text: str) -> None:
        self.notes.append(f"- {text}")
        print(text, flush=True)
        self.save()

    def free(self) -> float:
        """Bytes of device memory to be had."""
        return 1e8 if self.rehearse else float(torch.cuda.mem_get_info()[0])

    def release(self) -> None:
        if not self.rehearse:
            torch.cuda.empty_cache()

    def sets(self, size: float) -> int:
        """How many sets of `size` bytes take turns so that the next one isn't in a cache."""
        return 2 if self.rehearse else max(1, min(64, int(COLD // max(size, 1.0)) + 1))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile for the shapes at hand."""
        backend = "aot_eager" if self.rehearse else "inductor"
        return torch.compile(function, dynamic=False, backend=backend)

    def _fake(self) -> float:
        self._made_up = 1e-3 + (self._made_up * 1.618) % 1e-3
        return self._made_up

    def seconds(
        self, calls: Sequence[Callable[[], object]], most: float = 0.4, queue: int = 10
    ) -> float:
        """Median seconds of a call on the device; the calls take turns, ``queue`` at a time.

        Queued, the gaps between launches don't count unless launching is what takes the time. Calls
        that take long are made fewer times: two queues, but at least ``most`` seconds of them.
        """
        for call in calls[: 3 if queue > 1 else 1]:
            call()
        if self.rehearse:
            return self._fake()
        torch.cuda.synchronize()
        times: list[float] = []
        end, turn = time.monotonic() + most, 0
        while len(times) < 2 * queue or (time.monotonic() < end and len(times) < 2000):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(queue + 1)]
            marks[0].record()
            for mark in marks[1:]:
                calls[turn % len(calls)]()
                turn += 1
                mark.record()
            torch.cuda.synchronize()
            pairs = zip(marks[:-1], marks[1:], strict=True)
            times += [a.elapsed_time(b) * 1e-3 for a, b in pairs]
            if time.monotonic() > end + most:  # slow ones: one queue does
                break
        return statistics.median(times)

    def compare(
        self,
        forms: dict[str, Sequence[Callable[[], object]]],
        most: float = 0.3,
        queue: int = 10,
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
                    if "compiled" not in name and not isinstance(error, torch.OutOfMemoryError):
                        raise
                    failed.add(name)
                    rounds.pop(name, None)
                    self.note(f"{name} left out: {type(error).__name__}: {str(error)[:200]}")
                    self.release()
        spread = max((max(t) / min(t) - 1 for t in rounds.values()), default=0.0)
        return {name: statistics.median(t) for name, t in rounds.items()}, spread


def gb(size: float, seconds: float) -> float:
    return size / seconds / 1e9
