"""A tracker's history on disk and in TensorBoard: read back in blocks, a step never waits for one.

`CurvatureLog` hands every measurement to its writers: `CsvWriter`, `JsonlWriter`,
`TensorBoardWriter`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import choice, described, users_level, whole
from lyapcuda.extras import require
from lyapcuda.files import LineFile
from lyapcuda.tracker import CurvatureTracker

__all__ = ["PREFIX", "CsvWriter", "CurvatureLog", "JsonlWriter", "TensorBoardWriter", "Writer"]

Row = Mapping[str, Any]
#: Of the names under which loggers of others show curvature.
PREFIX = "curvature/"


class Writer(ABC):
    """Takes rows of named numbers. One of your own needs `write`."""

    def prepare(self, columns: Sequence[str], step: int) -> int:
        """Called once, before anything else: what the rows will hold, and the tracker's step.

        Raises what speaks against writing, and touches nothing.

        Returns:
            The step of the last row that is there already; rows up to it aren't written again.
        """
        return 0

    def open(self) -> None:  # noqa: B027  (may stay empty, as the two below)
        """Called once all writers are prepared."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Takes all of these rows, or raises and takes none."""

    def go_back(self, step: int) -> None:  # noqa: B027
        """The tracker goes on from an earlier state: drops what was written of later steps."""

    def sync(self) -> None:  # noqa: B027
        """Makes what was written safe."""

    def close(self) -> None:  # noqa: B027
        """No row follows."""


class _FileWriter(Writer):
    #: How even a single line that was broken off begins; None where a head was there first.
    _begins: str | None = None

    def __init__(self, path: str | os.PathLike[str], mode: str = "x") -> None:
        choice("mode", mode, ("x", "a", "w"))
        self.path, self.mode = Path(path), mode
        self._file: LineFile | None = None

    def prepare(self, columns: Sequence[str], step: int) -> int:
        self._columns, kept, last = list(columns), [], 0
        if self.mode == "x" and self.path.exists():
            raise FileExistsError(
                f'{self.path}: exists; mode="a" goes on with it, mode="w" replaces it'
            )
        if self.mode == "a" and self.path.exists():
            kept, last = self._kept(step)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: there is no folder {self.path.parent}")
        self._first = kept or self._head()
        return last

    def _kept(self, step: int) -> tuple[list[str], int]:
        """The lines to go on from, up to a step, and the step of the last of them."""
        kept: list[str] = []
        last = 0
        try:
            lines, torn = complete_lines(self.path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not a log: {error}") from error
        if torn and not lines and not (self._begins and torn.startswith(self._begins)):
            lines = [torn]  # a file that never was a log is refused, not cut
        for number, line in enumerate(lines, 1):
            try:
                at = self._step_of(line, number)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number}: {error}") from error
            if at is not None and not last < at:
                raise ValueError(f"{self.path}: line {number}: step {at} after {last}")
            if at is not None and at > step:
                break  # written after the checkpoint that the tracker came from
            kept.append(line)
            last = last if at is None else at
        return kept, last

    def open(self) -> None:
        self._file = LineFile(self.path, self._first)
        self._first = []

    def go_back(self, step: int) -> None:
        kept, _ = self._kept(step)
        self._file.close()
        self._first = kept
        self.open()

    def write(self, rows: Sequence[Row]) -> None:
        self._file.add([self._line([row[name] for name in self._columns]) for row in rows])

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _head(self) -> list[str]:
        return []

    @abstractmethod
    def _line(self, values: Sequence[Any]) -> str: ...

    @abstractmethod
    def _step_of(self, line: str, number: int) -> int | None:
        """Of a line in a file to go on with; None for the head."""


class CsvWriter(_FileWriter):
    """A CSV with a head; numbers in full precision, ``nan`` and ``inf`` as such.

    Args:
        path: the file.
        mode: "x", a new file; "w", replaces one; "a", goes on with one where it ended: a torn last
            line is dropped, and so are rows past the tracker's step (of a run that was broken off
            after its last checkpoint). One with other columns is refused.
    """

    def _head(self) -> list[str]:
        return [csv_line(self._columns)]

    def _line(self, values: Sequence[Any]) -> str:
        return csv_line(int(v) if isinstance(v, bool) else v for v in values)

    def _step_of(self, line: str, number: int) -> int | None:
        values = next(csv.reader([line]), [])
        if number == 1:
            if values != self._columns:
                raise ValueError(f"columns {values}, expected {self._columns}")
            return None
        if len(values) != len(self._columns):
            raise ValueError(f"{len(values)} values, expected {len(self._columns)}")
        return int(values[self._columns.index("step")])


class JsonlWriter(_FileWriter):
    """A JSON object a line; what isn't finite is null. Arguments as for `CsvWriter`."""

    _begins = '{"step": '

    def _line(self, values: Sequence[Any]) -> str:
        finite = [v if math.isfinite(v) else None for v in values]
        return json.dumps(dict(zip(self._columns, finite, strict=True)))

    def _step_of(self, line: str, number: int) -> int | None:
        row = json.loads(line)
        if not isinstance(row, dict) or list(row) != self._columns:
            raise ValueError(f"other names than {self._columns}")
        return int(row["step"])


class TensorBoardWriter(Writer):
    """A scalar of TensorBoard for every column.

    Args:
        log: a ``torch.utils.tensorboard.SummaryWriter``, which stays yours to close, or the folder
            of a new one. Of a run that was broken off, what is in the folder past the tracker's
            step is hidden; points that the history still holds are written again.
        prefix: of the tags.

    Raises:
        ImportError: tensorboard isn't installed.
    """

    def __init__(self, log: Any, prefix: str = PREFIX) -> None:
        self._log, self.prefix, self._own = log, prefix, not hasattr(log, "add_scalar")
        if self._own:
            require("tensorboard", "TensorBoardWriter")
            from torch.utils.tensorboard import SummaryWriter

            self._new = SummaryWriter

    def prepare(self, columns: Sequence[str], step: int) -> int:
        self._step = step
        return 0

    def open(self) -> None:
        step = self._step
        if self._own:
            self._log = self._new(os.fspath(self._log), purge_step=step + 1 if step else None)

    def go_back(self, step: int) -> None:
        if self._own:
            folder = self._log.log_dir
            self._log.close()
            self._log = self._new(folder, purge_step=step + 1)

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self._log.add_scalar(self.prefix + name, value, row["step"])

    def sync(self) -> None:
        self._log.flush()

    def close(self) -> None:
        if self._own and hasattr(self._log, "close"):
            self._log.close()


_BY_SUFFIX: dict[str, Callable[..., Writer]] = {".csv": CsvWriter, ".jsonl": JsonlWriter}


class CurvatureLog:
    """Writes every measurement of a tracker, with the loss and whatever else you name.

    Use it as a context manager, or call `close`. It needs no call in the training loop, and works
    the same with `CurvatureTracker.attach`. Measurements are read back, which waits for the device,
    only every so many. Also written is what the tracker's history holds already.

    Args:
        tracker: with a history of at least ``every``. Where it loads a state, that of an earlier
            step say, the log goes on from there: rows past that step are dropped from the files.
        targets: paths that end in ``.csv`` or ``.jsonl``, SummaryWriters of TensorBoard, `Writer`s.
        every: how many measurements are read back at once.
        values: further columns: name → a function without arguments that returns a number or a
            tensor of one element (kept on its device until it is read back). Called after every
            measurement, before the optimizer's step that follows. For instance
            ``{"lr": lambda: optimizer.param_groups[0]["lr"]}``.
        mode: for targets that are paths: see `CsvWriter`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        FileExistsError: a file is there and mode is "x". All of these before any file is touched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> tracker = CurvatureTracker([theta])
        >>> with CurvatureLog(tracker, folder / "run.csv"):
        ...     for _ in range(3):
        ...         _ = tracker.step(lambda: theta.square().sum())
        >>> len((folder / "run.csv").read_text().splitlines())
        4
    """

    def __init__(
        self,
        tracker: CurvatureTracker,
        *targets: Any,
        every: int = 100,
        values: Mapping[str, Callable[[], Tensor | float]] | None = None,
        mode: str = "x",
    ) -> None:
        whole("every", every)
        if not targets:
            raise ValueError("targets: none given, there is nowhere to write to")
        if not isinstance(tracker, CurvatureTracker):
            raise TypeError(
                f"tracker={described(tracker)}: expected a CurvatureTracker (of LyapunovSGD: "
                "optimizer.tracker)"
            )
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"values={described(values)}: expected a mapping of names to functions")
        if every > tracker.history_capacity:
            raise ValueError(
                f"every={every}: the tracker keeps only {tracker.history_capacity} measurements; "
                f"CurvatureTracker(history={every}) keeps enough"
            )
        self.tracker, self.every = tracker, every
        self._values = dict(values or {})
        columns = list(tracker.history(after=tracker.recorded).columns())
        for name, value in self._values.items():
            if name in columns:
                raise ValueError(f"values: there is a column {described(name)} already")
            if not callable(value):
                raise TypeError(f"values: {name}={described(value)}: expected a function")
        self._writers = [_writer_of(target, mode) for target in targets]
        self._read = 0  # measurements that were read back
        self._waiting: list[dict[str, Tensor | float]] = []
        names = [*columns, *self._values]
        self._last = [writer.prepare(names, tracker.calls) for writer in self._writers]
        try:
            for writer in self._writers:
                writer.open()
        except BaseException:
            for writer in self._writers:
                writer.close()
            raise
        self._handles = [
            tracker.register_step_hook(self._measured),
            tracker.register_load_hook(self._before_load),
        ]
        self._closed = False

    def _measured(self, tracker: CurvatureTracker) -> None:
        now = {}
        for name, value in self._values.items():
            found = value()
            now[name] = found.detach().reshape(()).clone() if isinstance(found, Tensor) else found
        self._waiting.append(now)
        if len(self._waiting) >= self.every:
            self.flush()

    def _before_load(self) -> Callable[[], None]:
        self.flush()
        return self._after_load

    def _after_load(self) -> None:
        """The tracker has another history now, that of the state it goes on from."""
        calls = self.tracker.calls
        for i, writer in enumerate(self._writers):
            if self._last[i] > calls:
                writer.go_back(calls)
                self._last[i] = calls
        self._read = 0  # rows up to `_last` are written already

    def flush(self) -> None:
        """Reads back and writes what waits. After an exception it still waits: call again.

        Measurements that were overwritten in the tracker's history meanwhile get a UserWarning.
        """
        history = self.tracker.history(after=self._read)
        end = self._read + history.overwritten + len(history)
        if history.overwritten and self._read:
            warnings.warn(
                f"{history.overwritten} measurements were overwritten before they were written: "
                "make the tracker's history larger than every",
                stacklevel=users_level(),
            )
        columns = history.columns()
        columns |= _aligned(self._values, self._waiting, len(history))
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for i, writer in enumerate(self._writers):
            new = [row for row in rows if row["step"] > self._last[i]]
            if new:
                writer.write(new)
                self._last[i] = new[-1]["step"]  # a retry after another writer's failure skips them
        self._read, self._waiting = end, []

    def sync(self) -> None:
        """Writes what waits and makes it safe: before a checkpoint, which must not be ahead."""
        self.flush()
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """Writes what waits, makes it safe, and ends the log. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        try:
            self.sync()
        finally:
            for writer in self._writers:
                writer.close()

    def __enter__(self) -> CurvatureLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _writer_of(target: Any, mode: str) -> Writer:
    if isinstance(target, Writer):
        return target
    if isinstance(target, str | os.PathLike):
        suffix = Path(target).suffix
        if suffix not in _BY_SUFFIX:
            raise ValueError(
                f"targets: {described(os.fspath(target))} ends in none of "
                f"{', '.join(_BY_SUFFIX)}; for TensorBoard pass TensorBoardWriter(folder)"
            )
        return _BY_SUFFIX[suffix](target, mode)
    if hasattr(target, "add_scalar"):
        return TensorBoardWriter(target)
    raise TypeError(f"targets: {described(target)} is no path, SummaryWriter or Writer")


def _aligned(
    names: Iterable[str], waiting: Sequence[Mapping[str, Any]], count: int
) -> dict[str, list[float]]:
    """The further columns of the newest ``count`` measurements; NaN where they weren't asked for.

    Tensors of one device are read back together.
    """
    out = {}
    waiting = waiting[max(0, len(waiting) - count) :]
    for name in names:
        found = [row[name] for row in waiting]
        if found and all(isinstance(value, Tensor) for value in found):
            found = torch.stack(found).tolist()
        out[name] = [math.nan] * (count - len(found)) + [float(value) for value in found]
    return out


def csv_line(values: Iterable[Any]) -> str:
    """One row of a CSV, without the line's end."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def complete_lines(path: Path) -> tuple[list[str], str]:
    """The lines that were written to their end, and what of the last one was."""
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    return lines, torn
