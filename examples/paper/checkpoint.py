"""Checkpoints: written whole or not at all, and read without running anything they hold."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lyapcuda.files import replace_file

FORMAT = "lyapcuda-experiment"
VERSION = 1
_ENTRIES = {
    "config": dict,
    "fingerprint": str,
    "step": int,
    "model": dict,
    "schedule": dict,
    "loader": dict,
    "rng": dict,
}


def save(path: Path, entries: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file to make or replace.
        entries: tensors and plain values under the names ``config``, ``fingerprint``, ``step``,
            ``model``, ``schedule``, ``loader`` and ``rng``.
    """
    content = {"format": FORMAT, "version": VERSION, **entries}
    # To memory first: torch.save hides an error of the file behind one of its own.
    serialised = io.BytesIO()
    torch.save(content, serialised)
    replace_file(path, lambda file: file.write(serialised.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of our checkpoints, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if not path.is_file():
        raise ValueError(f"{path}: not a checkpoint file")
    with path.open("rb") as file:  # here, so that an OSError from torch means a damaged file
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ValueError(f"{path}: not a readable checkpoint: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a lyapcuda checkpoint")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: checkpoint version {content.get('version')}, this program reads {VERSION}"
        )
    for name, kind in _ENTRIES.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: damaged checkpoint: {name} is missing or malformed")
    return content


def rng_state() -> dict[str, Any]:
    """The states of torch's global generators, on the CPU and every CUDA device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Take up a state from :func:`rng_state`; CUDA's only on as many devices as it came from."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
