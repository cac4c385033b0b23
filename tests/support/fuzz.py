"""Damaged files for the readers of examples.paper: an error or a right answer, never a crash,
another exception, or anything run. For test_fuzz.py and bench/robustness.py.
"""

from __future__ import annotations

import collections
import os
import pickle
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cifar_files import python2_batch
from examples.paper import checkpoint, cifar

#: What code in a file would have to do to be of any use.
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.", "shutil.")
_seen: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    # Modules may be imported late; text is not to be run.
    text = event == "exec" and arguments[0].co_filename.startswith("<")
    if event.startswith(_EVENTS) or event == "os.remove" or text:
        _seen.append(f"{event} {arguments!r:.80}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _seen.append(f"{event} {arguments!r:.80}")


def _rows() -> tuple[np.ndarray, list[int]]:
    return np.random.default_rng(3).integers(0, 256, (2, cifar.PIXELS), dtype=np.uint8), [3, 9]


def seeds(kind: str) -> list[bytes]:
    """Whole files of a kind."""
    pixels, labels = _rows()
    if kind == "bin":
        whole = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
        return [whole.tobytes()]
    if kind == "pickle":
        batch = {b"data": pixels, b"labels": labels, b"batch_label": b"one"}
        return [*(pickle.dumps(batch, protocol=p) for p in range(5)), python2_batch(pixels, labels)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        entries = {name: of() for name, of in checkpoint._ENTRIES.items()}
        entries |= {"model": {"w": torch.arange(6.0).view(2, 3)}, "config": {"model": "mlp"}}
        checkpoint.save(path, entries)
        return [path.read_bytes()]


_SYSTEM = pickle.dumps(os.system)[2:-1]
#: Pieces that mean something in a pickle or a zip.
_TOKENS = [
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"(S'true'\ntR", b"R", b"b"),
    *(b"\x93", b"\x81", b"\x92", b"i", b"o", b"\x82\x01", b"P", b"Q", b".", b"\x80\x05", _SYSTEM),
    *(
        b"\xff" * 4,
        b"\x00" * 8,
        b"\x7f\xff\xff\xff",
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"r\xff\xff\xff\x7f",
    ),
]


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, pieces lost, doubled or put in, the end cut off."""
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of them at the start, where a pickle's structure is (and the end, where a zip's is).
        span = min(len(raw), 300) if rng.random() < 0.5 else len(raw)
        at = rng.randrange(span) if span else 0
        if rng.random() < 0.25:
            at = max(len(raw) - 1 - at, 0)
        length = rng.choice((1, 2, 4, 16, 300))
        match rng.randrange(6):
            case 0 if raw:
                raw[at] ^= 1 << rng.randrange(8)
            case 1 if raw:
                raw[at] = rng.randrange(256)
            case 2:
                del raw[at : at + length]
            case 3:
                raw[at:at] = raw[at : at + length]
            case 4:
                raw[at:at] = rng.choice(_TOKENS)
            case 5 if rng.random() < 0.3:
                del raw[at:]
    return bytes(raw)


def _right_images(result: tuple[np.ndarray, np.ndarray]) -> bool:
    images, labels = result
    shapes = images.shape[1:] == (3, 32, 32) and len(images) == len(labels) > 0
    types = images.dtype == np.uint8 and labels.dtype == np.int64
    return shapes and types and 0 <= labels.min() and labels.max() < cifar.CLASSES


def _right_checkpoint(content: dict) -> bool:
    return all(isinstance(content[name], kind) for name, kind in checkpoint._ENTRIES.items())


READERS: dict[str, tuple[Callable, Callable]] = {
    "bin": (cifar.read_binary, _right_images),
    "pickle": (cifar.read_pickle, _right_images),
    "checkpoint": (checkpoint.load, _right_checkpoint),
}


def fuzz(kind: str, count: int, seed: int = 0) -> dict[str, int]:
    """Reads ``count`` damaged files; returns how many were refused and how many could be read.

    Raises:
        AssertionError: another exception than ValueError, an answer of the wrong form, or an
            attempt to run or write something.
    """
    global _watching
    if not getattr(sys, "_lyapcuda_audit", False):
        sys.addaudithook(_audit)  # it can't be taken away again: once
        sys._lyapcuda_audit = True
    rng, whole, (read, right) = random.Random(seed), seeds(kind), READERS[kind]
    counts: collections.Counter[str] = collections.Counter(refused=0, read=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for raw in whole:
            path.write_bytes(raw)
            assert right(read(path)), kind
        for number in range(count):
            raw = mutated(rng.choice(whole), rng)
            path.write_bytes(raw)
            _seen.clear()
            _watching = True
            try:
                result = read(path)
            except ValueError as error:
                assert str(path) in str(error), (number, error)
                counts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
            else:
                assert right(result), (kind, number)
                counts["read"] += 1
            finally:
                _watching = False
            assert not _seen, (kind, number, _seen)
    return dict(counts)
