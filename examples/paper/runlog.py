"""The CSV of a run: one row a step, read back from the device a few steps at a time."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import torch
from torch import Tensor

from lyapcuda.files import LineFile
from lyapcuda.log import csv_line

MEASURED = ("loss", "exponent", "beta", "h", "h_low", "h_high", "inverse_h", "lr")
COLUMNS = ("step", "epoch", *MEASURED)
# Reading a value back waits for the device, so it is done for this many steps at once.
READ_EVERY = 20


def read_rows(path: Path, steps: int) -> list[list[str]]:
    """The first ``steps`` rows of a CSV, as text; later ones, which a crash may leave, are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a CSV, or holds fewer rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing beside the checkpoint it belongs to")
    rows: list[list[str]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            if next(reader, None) != list(COLUMNS):
                raise ValueError("other columns than a run's")
            for row in reader:
                if len(rows) == steps:
                    break
                if len(row) != len(COLUMNS) or row[0] != str(len(rows) + 1):
                    raise ValueError(f"row {len(rows) + 1} is malformed")
                rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    if len(rows) < steps:
        raise ValueError(f"{path}: ends at step {len(rows)}, the checkpoint is at step {steps}")
    return rows


class RunLog:
    """Appends to a run's CSV.

    Args:
        path: the CSV, which is replaced.
        rows: rows to begin with, from :func:`read_rows`.

    Attributes:
        path: the CSV.
        last: the values of the last row read back, by column; empty before the first.
    """

    def __init__(self, path: Path, rows: list[list[str]] | None = None) -> None:
        self.path = path
        self._file = LineFile(path, map(csv_line, [COLUMNS, *(rows or [])]))
        self._waiting: list[tuple[int, float, Tensor]] = []
        self.last: dict[str, float] = {}
        if rows:
            self.last = dict(zip(COLUMNS, map(float, rows[-1]), strict=True))

    def append(self, step: int, epoch: float, values: list[Tensor]) -> None:
        """Keep one step's values: 0-dim tensors on one device, in the order of MEASURED."""
        # stack copies: the tracker overwrites its tensors in the next step.
        self._waiting.append((step, epoch, torch.stack([v.detach().double() for v in values])))

    @property
    def due(self) -> bool:
        """Whether enough steps wait to be read back."""
        return len(self._waiting) >= READ_EVERY

    def flush(self) -> int | None:
        """Read back and write what waits; a loss that isn't finite ends the run there.

        Returns:
            The step at which the loss stopped being finite, else None.
        """
        if not self._waiting:
            return None
        table = torch.stack([values for *_, values in self._waiting]).tolist()
        diverged, lines = None, []
        for (step, epoch, _), values in zip(self._waiting, table, strict=True):
            lines.append(csv_line([step, epoch, *values]))
            self.last = dict(zip(COLUMNS, (step, epoch, *values), strict=True))
            if not math.isfinite(self.last["loss"]):
                diverged = step
                break
        self._file.add(lines)
        self._waiting = []
        return diverged

    def sync(self) -> None:
        """Make what was written safe, so that a checkpoint is never ahead of its CSV."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; what waits and was not flushed is lost."""
        self._file.close()
