"""docs/faults.md, read: the faults, and the tests that hold what is promised of each."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
TABLE = ROOT / "docs" / "faults.md"
COLUMNS = ["fault", "promised", "tests", "runs on"]
PLACES = {"CPU", "emulated", "GPU"}


@dataclass(frozen=True)
class Fault:
    """A row: tests as "file.py::test_name" (`path_of`), C++ tests by path, and where they run."""

    name: str
    promised: str
    tests: tuple[str, ...]
    files: tuple[str, ...]
    places: frozenset[str]


def path_of(test: str) -> Path:
    """The file of a test named "file.py::test_name", wherever it lies in tests/.

    Raises:
        ValueError: there is none, or several of that name.
    """
    name = test.partition("::")[0]
    match list(TESTS.rglob(name)):
        case [path]:
            return path
        case found:
            raise ValueError(f"docs/faults.md names {name}: {len(found)} files of tests/")


def _installed(test: str) -> bool:
    """False for a test of an integration whose package isn't: tests/integrations/conftest.py."""
    stem = test.partition(".py")[0]
    package = stem.removeprefix("test_with_")
    return package == stem or importlib.util.find_spec(package) is not None


def read(path: Path = TABLE) -> list[Fault]:
    """The rows in order, without tests of packages that aren't installed.

    Raises:
        ValueError: a row that has other columns, names no test, or another place than the three.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells == COLUMNS or set("".join(cells)) <= {"-"}:
            continue
        named = re.findall(r"`([^`]+)`", cells[2]) if len(cells) == len(COLUMNS) else []
        tests = tuple(name for name in named if "::" in name)
        places = frozenset(cells[-1].split(", "))
        if not tests or not places <= PLACES:
            raise ValueError(f"{path.name}:{number}: {line}")
        files = tuple(name for name in named if "::" not in name)
        tests = tuple(filter(_installed, tests))
        if not tests:
            continue
        found.append(Fault(cells[0], cells[1], tests, files, places))
    return found
