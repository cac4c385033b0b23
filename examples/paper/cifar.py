"""Readers for the two published CIFAR-10 folders, which trust nothing they read.

Both return the images as ``uint8`` of shape ``(n, 3, 32, 32)`` and the labels as ``int64`` of shape
``(n,)``. A malformed file raises :class:`ValueError` naming the file; a missing one
:class:`FileNotFoundError`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
PIXELS = 3 * 32 * 32
ROW = 1 + PIXELS
TRAIN_NAMES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_NAME = "test_batch"
FOLDERS = {".bin": "cifar-10-batches-bin", "": "cifar-10-batches-py"}

Arrays = tuple[np.ndarray, np.ndarray]


def read_binary(path: Path) -> Arrays:
    """Read one file of the binary version: rows of a label byte and 3072 bytes of RGB planes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not a whole number of rows, or holds a label above 9.
    """
    raw = path.read_bytes()
    if not raw or len(raw) % ROW:
        raise ValueError(f"{path}: {len(raw)} bytes, expected a positive multiple of {ROW}")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, ROW)
    return _checked(path, rows[:, 1:], rows[:, 0].astype(np.int64))


def read_pickle(path: Path) -> Arrays:
    """Read one file of the Python version, admitting nothing but numeric arrays and containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a pickle, or asks for anything else to be built.
    """
    batch = restricted_load(path)
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: expected a dict, found {type(batch).__name__}")
    for key in (b"data", b"labels"):
        if key not in batch:
            raise ValueError(f"{path}: no {key!r} in the batch")
    data, labels = batch[b"data"], batch[b"labels"]
    if not isinstance(data, _Array):
        raise ValueError(f"{path}: b'data' must be an array, found {type(data).__name__}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: b'labels' must be a list of ints")
    # Before the conversion to int64, which a huge Python int would overflow.
    if labels and not 0 <= min(labels) <= max(labels) < CLASSES:
        raise ValueError(
            f"{path}: labels from {min(labels)} to {max(labels)}, expected 0 to {CLASSES - 1}"
        )
    try:
        array = data.to_numpy()
    except ValueError as error:
        raise ValueError(f"{path}: b'data': {error}") from error
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != PIXELS:
        raise ValueError(
            f"{path}: b'data' must be uint8 of shape (n, {PIXELS}), "
            f"found {array.dtype} of shape {array.shape}"
        )
    return _checked(path, array, np.asarray(labels, np.int64))


def read_folder(folder: Path) -> tuple[Arrays, Arrays]:
    """Read the training and the test rows of a CIFAR-10 folder of either version.

    Args:
        folder: ``cifar-10-batches-bin``, ``cifar-10-batches-py``, or the folder that holds one.

    Returns:
        ``((images, labels), (images, labels))``: training rows in file order, then test rows.

    Raises:
        FileNotFoundError: the folder, or one of its six files, is missing.
        ValueError: ``folder`` is not a folder, or one of the files is malformed.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    place, suffix = _find_version(folder)
    reader: Callable[[Path], Arrays] = read_binary if suffix else read_pickle
    paths = [place / (name + suffix) for name in (*TRAIN_NAMES, TEST_NAME)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing from the CIFAR-10 folder")
    *train, test = [reader(path) for path in paths]
    images = np.concatenate([images for images, _ in train])
    return (images, np.concatenate([labels for _, labels in train])), test


def _find_version(folder: Path) -> tuple[Path, str]:
    for place in (folder, *(folder / name for name in FOLDERS.values())):
        for suffix in FOLDERS:
            if any((place / (name + suffix)).is_file() for name in (*TRAIN_NAMES, TEST_NAME)):
                return place, suffix
    raise FileNotFoundError(
        f"{folder}: no CIFAR-10 files: expected data_batch_1.bin or data_batch_1, "
        f"or a folder {' or '.join(FOLDERS.values())}"
    )


def _checked(path: Path, rows: np.ndarray, labels: np.ndarray) -> Arrays:
    if not len(rows) or len(rows) != len(labels):
        raise ValueError(f"{path}: {len(rows)} images and {len(labels)} labels")
    if labels.max() >= CLASSES:
        row = int(labels.argmax())
        raise ValueError(f"{path}: label {labels[row]} in row {row}, expected 0 to {CLASSES - 1}")
    return rows.reshape(-1, 3, 32, 32), labels


# --- the restricted unpickler -----------------------------------------------------------------
#
# Nothing of numpy is ever called with what a file says: the names a batch may use stand for the
# objects below, which only take notes. They have no __dict__ and refuse BUILD where a batch has no
# use for it, so that a file can't leave anything behind in them either.


class _Name:
    """Stands for an importable name; ``call`` is what REDUCE may do with it."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a pickle may not set the state of a function")


class _Dtype:
    """A numeric dtype: kind and size, such as ``u1``, and byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: Any, *flags: Any) -> None:
        if isinstance(name, bytes):
            name = name.decode("latin1")
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
            raise ValueError(f"dtype {name!r} is not numeric")
        self.name = name
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise ValueError("malformed dtype")
        self.order = order


class _Array:
    """An array as the file tells it; :meth:`to_numpy` believes it only if the bytes are there."""

    __slots__ = ("state",)

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("malformed array")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("malformed shape")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or len(shape) > 8:
            raise ValueError("malformed array")
        kind = np.dtype(dtype.order + dtype.name)
        if math.prod(shape) * kind.itemsize != len(raw):
            raise ValueError(f"shape {shape} of {kind} does not fit {len(raw)} bytes")
        return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # How Python 3 spells bytes in protocol 2.
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise ValueError("malformed bytes")
    return text.encode("latin1")


def _not_callable(*args: Any) -> Any:
    raise ValueError("a pickle may not build this array directly")


_NAMES = {
    ("_codecs", "encode"): _Name(_encode),
    ("numpy", "dtype"): _Name(_Dtype),
    ("numpy", "ndarray"): _Name(_not_callable),
    ("numpy.core.multiarray", "_reconstruct"): _Name(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_Array),
}

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG "
    "LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST "
    "LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE "
    "GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise ValueError(f"the pickle asks for {module}.{name}, which is refused") from None


def restricted_load(path: Path) -> Any:
    """Unpickle a file that may hold numeric arrays, dicts, lists, tuples, bytes, text and numbers.

    Returns:
        The object, where an array is a note of its shape, dtype and bytes, not yet checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the pickle is malformed or asks for anything else.
    """
    raw = path.read_bytes()
    try:
        _scan(raw)
        return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # an unpickler raises nearly anything on nonsense
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a CIFAR-10 batch: {reason}") from error


def _scan(raw: bytes) -> None:
    # Every length is compared with what is there, and memo slots are bounded: the unpickler in C
    # would allocate both as told before it looks.
    end = 0
    for opcode, argument, position in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise ValueError(f"opcode {opcode.name} at byte {position} is refused")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(raw):
            raise ValueError(f"memo slot {argument} at byte {position} is out of range")
        if opcode.name == "FRAME" and argument > len(raw):
            raise ValueError(f"frame of {argument} bytes at byte {position} is too long")
        end = (position or 0) + 1
    if end != len(raw):
        raise ValueError(f"{len(raw) - end} bytes after the end")
