"""docs/faults.md against the tests that there are."""

import subprocess
import sys
from pathlib import Path

import pytest

import fault_table

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def faults():
    return fault_table.read()


def ids(request, files):
    """Of the tests of these files: those of this session where it has them all."""
    chosen = request.config.option.keyword or request.config.option.markexpr
    items = request.session.items
    if not chosen and files <= {item.path for item in items}:
        return [item.nodeid for item in items if item.path in files]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *sorted(files)], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def collected(request, faults):
    """Test → the ids of its cases, of every file that the table names or that tests faults."""
    files = {fault_table.path_of(test) for fault in faults for test in fault.tests}
    files |= set(HERE.glob("test_faults_*.py")) - {Path(__file__)}
    found = {}
    for line in ids(request, files):
        name, _, case = line.split("/")[-1].partition("[")
        found.setdefault(name, []).append(case)
    return found


def test_every_test_named_is_collected(faults, collected):
    named = {test for fault in faults for test in fault.tests}
    assert sorted(named - set(collected)) == []
    for fault in faults:
        for file in fault.files:
            assert (fault_table.ROOT / file).exists(), file


def test_every_test_of_a_fault_is_named(faults, collected):
    named = {test for fault in faults for test in fault.tests}
    assert sorted(name for name in set(collected) - named if name.startswith("test_faults_")) == []


def test_they_run_where_the_table_says(faults, collected):
    for fault in faults:
        cases = [case for test in fault.tests for case in collected[test]]
        emulated = [case for case in cases if case.startswith("simt")]
        assert bool(emulated) == ("emulated" in fault.places), fault
        only_gpu = all("_gpu.py" in test for test in fault.tests)
        assert ("CPU" not in fault.places) or (len(cases) > len(emulated) and not only_gpu), fault
        sources = {fault_table.path_of(test).read_text() for test in fault.tests}
        assert ("GPU" not in fault.places) or any('missing("cuda")' in s for s in sources), fault


def test_no_fault_twice(faults):
    names = [fault.name for fault in faults]
    assert len(names) == len(set(names)) and len(names) > 40


@pytest.mark.parametrize(
    "row",
    [
        "| a fault | a promise | no test | CPU |",
        "| a fault | a promise | `test_a.py::test_b` | a place |",
        "| a fault | `test_a.py::test_b` | CPU |",
    ],
)
def test_a_malformed_row_is_named(row, tmp_path):
    path = tmp_path / "faults.md"
    path.write_text(f"| fault | promised | tests | runs on |\n|---|---|---|---|\n{row}\n")
    with pytest.raises(ValueError, match="faults.md:3"):
        fault_table.read(path)
