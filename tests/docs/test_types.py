"""The type hints as a user's checker sees them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "support" / "typical_use.py"


def test_a_typical_program_passes_mypy_strict(tmp_path):
    """Calls have precise results: none is Any, and no wrong argument goes unseen."""
    # Silent about the package's own insides, as it is where lyapcuda is installed.
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path), "--config-file", "", str(PROGRAM)]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_the_program_runs():
    names = runpy.run_path(str(PROGRAM))
    for part in ("along_training", "at_one_theta", "optimizers"):
        names[part]()
