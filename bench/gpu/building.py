"""The one place that knows how the extension is built with CUDA."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from gpu.processes import ROOT

SCRIPT = ROOT / "scripts" / "build_cuda.sh"


def build_command(python: str, architecture: str, out: Path | None = None) -> list[str]:
    """Builds the extension for an interpreter and a GPU's architecture ("9.0"): in place, or into a
    folder."""
    command = ["bash", str(SCRIPT), "--python", python, "--arch", architecture]
    return command + (["--out", str(out)] if out else [])


def build_environment(python: str) -> dict[str, str]:
    """What the build needs beside its command: the torch whose headers it takes."""
    return {"PYTHON": python, "MAX_JOBS": str(os.cpu_count() or 1)}


def missing_for_build() -> str | None:
    """What a build here lacks; None where it lacks nothing."""
    home = os.environ.get("CUDA_HOME")
    if shutil.which("nvcc") is None and not (home and (Path(home) / "bin" / "nvcc").exists()):
        return "no nvcc on PATH or in CUDA_HOME"
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else ()
    if not any((Path(folder) / "include" / "torch" / "headeronly").exists() for folder in folders):
        return "no headers of torch"
    return None
