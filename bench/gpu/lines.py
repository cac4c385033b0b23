"""Results as lines: one JSON object a line, in one file, each there as soon as it is known.

The processes of a run all append to the same file. Each learns from its environment which file that
is and until when it has time; a script that is run by hand prints its lines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "LYAPCUDA_GPU_CHECK"


@dataclass(frozen=True)
class Lines:
    """Where a process writes its lines, and by when (on the monotonic clock) it should be done."""

    path: str | None = None
    stage: str = ""
    process: str = ""
    until: float = float("inf")

    @classmethod
    def of_environment(cls) -> Lines:
        """What the process that started this one has set."""
        given = os.environ.get(VARIABLE)
        return cls(**json.loads(given)) if given else cls()

    def environment(self) -> dict[str, str]:
        """For a process that is to write here."""
        return {VARIABLE: json.dumps(asdict(self))}

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def write(self, kind: str, **values: Any) -> None:
        """Appends a line. One write: lines of several processes don't mix."""
        about = {"kind": kind, "stage": self.stage, "process": self.process}
        line = json.dumps({**about, **values}, default=str)
        if self.path is None:
            print(line, flush=True)
            return
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of files, in order; a line that was cut off is left out."""
    found = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [line for line in found if isinstance(line, dict) and "kind" in line]


def end_last_line(path: Path) -> None:
    """Ends a line that an earlier run was cut off in, so that the next one is a line of its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
