"""A pytest plugin: every failing test is a line at once, and how many passed every few seconds.

With xdist the process that hands out the tests writes; a test that hung or crashed its worker is a
failing one there. A worker whose device is lost (after an illegal access every call fails) ends,
and xdist starts another: so one wrong kernel is one failure, not a hundred.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Any

import pytest

from gpu.lines import Lines

#: Seconds between two counts.
EVERY = 5.0
#: Characters of a test's output that are kept.
MOST = 20000
#: Exit status of a worker that has lost its device.
LOST = 70


class Writer:
    """Writes the lines."""

    def __init__(self) -> None:
        self._lines, self._outcomes, self._last = Lines.of_environment(), {}, time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report.nodeid, report.when, report)
        elif report.when == "call" or report.skipped:
            self._outcomes.setdefault(report.nodeid, report.outcome)
        if time.monotonic() - self._last > EVERY:
            self._count()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report.nodeid, "collection", report)

    def pytest_sessionfinish(self) -> None:
        self._count()

    def _failed(self, test: str, when: str, report: Any) -> None:
        if self._outcomes.get(test) == "failed":
            return
        self._outcomes[test] = "failed"
        printed = [f"{title}:\n{text}" for title, text in getattr(report, "sections", ())]
        output = "\n".join([report.longreprtext, *printed])[-MOST:]
        self._lines.write("test", test=test, when=when, output=output)

    def _count(self) -> None:
        self._last = time.monotonic()
        self._lines.write("tests", counts=Counter(self._outcomes.values()))


class Worker:
    """Ends a worker of xdist whose device is lost."""

    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed = self._failed or report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self._failed and device_lost():
            os._exit(LOST)
        self._failed = False


def device_lost() -> bool:
    """Whether no call to the device succeeds in this process any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: Any) -> None:
    plugin = Worker() if hasattr(config, "workerinput") else Writer()
    config.pluginmanager.register(plugin, "gpu_check")
