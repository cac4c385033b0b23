"""Loads the compiled extension, lyapcuda._C; says in one line why it can't be."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

__all__ = ["gpus_here", "import_fault"]

_REBUILD = "build lyapcuda again beside it: `pip install --no-build-isolation .` in its sources"


def import_fault(error: ImportError, folder: Path) -> str:
    """Why the extension wasn't imported, in one line: what is wrong and what to do.

    Args:
        error: what the import raised.
        folder: where the extension should lie.
    """
    text = str(error)
    here = f"torch {torch.__version__}"
    here += f", of CUDA {torch.version.cuda}" if torch.version.cuda else ", which has no CUDA"
    built_with = re.search(r"libcudart\.so\.(\d+)", text)
    if built_with:
        return (
            f"lyapcuda is built for CUDA {built_with[1]}, but this is {here}: install a torch of "
            f"CUDA {built_with[1]}, or {_REBUILD}"
        )
    if re.search(r"lib(?:c10_cuda|torch_cuda)\.so", text):
        return (
            f"lyapcuda is built with CUDA, but this is {here}: install a torch with CUDA, or "
            f"{_REBUILD}"
        )
    if "undefined symbol" in text:
        return f"lyapcuda's extension and {here} don't fit ({text}): {_REBUILD}"
    others = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if isinstance(error, ModuleNotFoundError) or "cannot import name" in text:
        found = f" (there is {', '.join(others)}, for another Python)" if others else ""
        return (
            f"lyapcuda's extension isn't built here{found}: run `pip install --no-build-isolation "
            "--editable .` in its sources, or leave their folder to use an installed one"
        )
    return text


def gpus_here() -> str:
    """The GPUs that torch can use, by name, or in one line why there are none."""
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # Of a driver that is too old torch warns, with its version; without a driver it is silent.
        said = next((str(w.message) for w in caught if "driver" in str(w.message)), "")
        said = said.split(": ", 1)[-1].split(". ")[0].strip()
        return f"none: {said or 'torch finds no NVIDIA driver or no GPU'}"
    names = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        names.append(f"{torch.cuda.get_device_name(number)} (sm_{major}{minor})")
    return ", ".join(names)


try:
    from lyapcuda import _C  # noqa: F401
except ImportError as _error:
    # (Without Python's own guess, a circular import.)
    _cause = None if "partially initialized" in str(_error) else _error
    raise ImportError(import_fault(_error, Path(__file__).parent)) from _cause
