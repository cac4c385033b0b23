"""Files that hold either the old or the new: replaced whole, or added to line by line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["LineFile", "finite", "replace_file", "write_json"]


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` always holds the old content or the new, even after a crash.

    Args:
        path: the file.
        write: called with a binary file object.

    Raises:
        OSError: naming the file, where there is no room or no permission; it is what it was.
    """
    # In the same folder: os.replace is atomic only within a file system.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of write(), it names no file
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the new name itself may be lost
    finally:
        os.close(folder)


def finite(value: Any) -> Any:
    """Plain values with None for every float that JSON can't hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, whole or not at all; what isn't finite becomes null."""
    text = json.dumps(finite(value), indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


class LineFile:
    """A text file of one line a row, begun whole and then only added to.

    Args:
        path: the file, which is replaced.
        lines: to begin with, without their ends.
    """

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        self.path = path
        data = _encoded(lines)
        replace_file(path, lambda file: file.write(data))
        self._size = len(data)
        self._file = path.open("ab", buffering=0)

    def add(self, lines: Iterable[str]) -> None:
        """Appends all of the lines, or after an OSError none of them."""
        data = memoryview(_encoded(lines))
        size = self._size + len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except BaseException:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size = size

    def sync(self) -> None:
        """Makes what was written safe, as before a checkpoint that must not be ahead of it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
