"""Runs every test that docs/faults.md names and prints how many faults, inputs and steps that were.

    python bench/faults.py                   # all of them; --quick: without those over ten seconds
    python bench/faults.py --only reseed     # faults whose row has that word

An input is a test case, and whatever more a test records: ``record_property("inputs", 100_000)``;
a step is a `CurvatureTracker.step`, and what a test records as ``record_property("steps", n)``
(those of other processes). Exits with 1 where a test fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fault_table  # noqa: E402


@dataclass
class Counts:
    """Of one run, or of one fault in it."""

    faults: int = 0
    tests: int = 0
    cases: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    steps: int = 0

    def add(self, other: Counts) -> None:
        self.tests += other.tests
        self.inputs += other.inputs
        self.steps += other.steps
        for outcome, count in other.cases.items():
            self.cases[outcome] = self.cases.get(outcome, 0) + count

    def line(self) -> str:
        outcomes = ", ".join(f"{self.cases[name]} {name}" for name in sorted(self.cases))
        return f"{self.tests} tests, {self.inputs} inputs ({outcomes}), {self.steps} steps"


class Recorder:
    """A pytest plugin: what each test came to, and how many steps trackers took in it."""

    def __init__(self) -> None:
        self.of: dict[str, Counts] = {}
        self._steps = 0

    def pytest_configure(self) -> None:
        from lyapcuda.tracker import CurvatureTracker

        step, recorder = CurvatureTracker.step, self

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            recorder._steps += 1
            return step(self, *args, **options)

        CurvatureTracker.step = counted

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.split("/")[-1].split("[")[0]
        counts = self.of.setdefault(name, Counts(tests=1))
        recorded = dict(report.user_properties)
        if report.when == "call" or report.outcome != "passed":
            counts.cases[report.outcome] = counts.cases.get(report.outcome, 0) + 1
            counts.inputs += int(recorded.get("inputs", report.outcome != "skipped"))
            counts.steps += int(recorded.get("steps", 0)) + self._steps
        self._steps = 0


def summary(faults: list[fault_table.Fault], of: dict[str, Counts]) -> tuple[Counts, list[str]]:
    """All counts, every test once, and a line for every fault."""
    total, lines = Counts(faults=len(faults)), []
    for name in dict.fromkeys(test for fault in faults for test in fault.tests):
        total.add(of.get(name, Counts()))
    for fault in faults:
        row = Counts()
        for name in fault.tests:
            row.add(of.get(name, Counts()))
        lines.append(f"{fault.name}: {row.line()}")
    return total, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="WORD", help="faults whose name or promise has this word")
    parser.add_argument("--quick", action="store_true", help="leave out tests marked slow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    arguments, rest = parser.parse_known_args()
    faults = fault_table.read()
    if arguments.only:
        faults = [f for f in faults if arguments.only in f"{f.name} {f.promised}"]
        if not faults:
            parser.error(f"--only {arguments.only}: no such fault")
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    recorder = Recorder()
    options = ["-q", "--no-header", *(["-m", "not slow"] if arguments.quick else []), *rest]
    places = [f"{fault_table.path_of(t).parent}/{t}" for t in tests]
    status = pytest.main([*options, *places], plugins=[recorder])
    total, lines = summary(faults, recorder.of)
    print("\n".join(lines))
    print(f"\n{total.faults} faults: {total.line()}")
    if arguments.json:
        report = {"total": asdict(total), "tests": {n: asdict(c) for n, c in recorder.of.items()}}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(status != pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
