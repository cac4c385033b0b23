"""What `import lyapcuda` brings, and that it stays cheap beside torch's own."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import lyapcuda

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def imports() -> tuple[float, float, int, list[str]]:
    """As bench/import_time.py measures them."""
    sys.path.insert(0, str(BENCH))
    try:
        code = runpy.run_path(str(BENCH / "import_time.py"), run_name="bench")["IMPORTS"]
    finally:
        sys.path.remove(str(BENCH))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


def test_nothing_optional_is_imported(imports):
    """torch is there before, and numpy with it. matplotlib, scipy, ... come when they are used."""
    assert imports[3] == ["lyapcuda"]


def test_it_takes_a_fraction_of_torchs_own_import(imports):
    of_torch, over = imports[:2]
    assert over < max(of_torch / 2, 0.3)


def test_the_version_is_that_of_the_installed_package():
    try:
        installed = metadata.version("lyapcuda")
    except metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert lyapcuda.__version__ == installed


def test_type_hints_are_shipped():
    folder = Path(lyapcuda.__file__).parent
    assert (folder / "py.typed").exists() and (folder / "_C.pyi").exists()
