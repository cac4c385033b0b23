"""Runs processes side by side, each within its time, and keeps what they print.

Whatever one of them does (fails, crashes, hangs), the others go on. Their output goes to one log,
line by line as it comes, each line behind the name of its process.
"""

from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from gpu.lines import Lines

ROOT = Path(__file__).parents[2]
#: A process isn't started for less (seconds).
LEAST = 5.0
#: What is kept of the end of a process's output (characters).
TAIL = 6000
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """A process to run."""

    name: str
    command: Sequence[str | Path]
    #: It is told to be done by then ...
    seconds: float
    #: ... and ended so much later.
    grace: float = 0.0
    #: What running out of time means: "failed" (it may hang), "unfinished" (a check that found
    #: nothing wrong as far as it came), "enough" (what was measured is written).
    late: str = "failed"
    #: Printed lines that mean a fault, also where it runs out of time before it can say so.
    fault: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    #: Why it isn't to be run; None: it is.
    left_out: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    job: Job
    #: passed, failed, unfinished, enough (as `Job.late`), left out
    outcome: str
    status: str
    seconds: float = 0.0
    tail: str = ""


class _Running:
    def __init__(self, job: Job, end: float, lines: Lines, log: BinaryIO) -> None:
        self.job, self._log, self.start = job, log, time.monotonic()
        self._planned = min(self.start + job.seconds, end)
        self.until = min(self._planned + job.grace, end)
        lines = replace(lines, process=job.name, until=self._planned)
        self._process = subprocess.Popen(
            [str(word) for word in job.command],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                **lines.environment(),
                **job.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that what it starts is ended with it
            preexec_fn=_end_with_parent,
        )
        self.pipe = self._process.stdout
        os.set_blocking(self.pipe.fileno(), False)
        self._rest, self._tail, self._fault = b"", "", False

    def read(self) -> bool:
        """Takes what was printed to the log; False once the pipe is closed."""
        while not self.pipe.closed:
            try:
                found = os.read(self.pipe.fileno(), 65536)
            except BlockingIOError:
                return True
            if not found:
                return False
            *whole, self._rest = (self._rest + found).split(b"\n")
            self._keep(whole)
        return False

    def _keep(self, lines: list[bytes]) -> None:
        name = self.job.name.encode()
        self._log.write(b"".join(name + b" | " + line + b"\n" for line in lines))
        self._log.flush()
        text = "".join(line.decode(errors="replace") + "\n" for line in lines)
        self._tail = (self._tail + text)[-TAIL:]
        if self.job.fault and re.search(self.job.fault, text, re.MULTILINE):
            self._fault = True

    def ended(self) -> Ended | None:
        """How it ended; None while it runs and has time."""
        # Not reaped before its group is ended: until then the number of the group is its own.
        gone = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        now = time.monotonic()
        if gone is None and now < self.until:
            return None
        after = self.kill()
        if self._rest:
            self._keep([self._rest])
        took = now - self.start
        if gone is not None:
            code = self._process.returncode
            if code == 0:
                return self._result("passed", "passed", took)
            how = f"exit status {code}" if code > 0 else f"ended by signal {-code}"
            return self._result("failed", f"failed: {how}", took)
        outcome = "failed" if self._fault else self.job.late
        status = f"out of time: stopped after {took:.0f} s{after}"
        return self._result(outcome, status, took)

    def _result(self, outcome: str, status: str, took: float) -> Ended:
        return Ended(self.job, outcome, status, round(took, 1), self._tail)

    def kill(self) -> str:
        """Ends the process and what it has started; says so where that fails."""
        # Also where it has ended by itself: what it left running holds the GPU.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # the driver doesn't let go of it
            return "; it could not be ended"
        finally:
            self.read()
        return ""


def _end_with_parent() -> None:
    """In the new process: it ends when the one that started it does, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    jobs: Sequence[Job], at_once: int, end: float, lines: Lines, log: BinaryIO
) -> Iterator[Ended]:
    """Runs jobs, at most ``at_once`` at a time, until ``end``; yields each as it ends."""
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                if job.left_out is not None:
                    yield Ended(job, "left out", f"left out: {job.left_out}")
                elif end - time.monotonic() < LEAST:
                    outcome = "left out" if job.late == "enough" else "unfinished"
                    yield Ended(job, outcome, "left out: no time")
                else:
                    running.append(_Running(job, end, lines, log))
            _wait(running)
            for process in list(running):
                if ended := process.ended():
                    running.remove(process)
                    yield ended
    finally:
        for process in running:
            process.kill()


def _wait(running: Sequence[_Running]) -> None:
    """Until one of them prints, or a moment."""
    with selectors.DefaultSelector() as selector:
        for process in running:
            if not process.pipe.closed:
                selector.register(process.pipe, selectors.EVENT_READ, process)
        if not selector.get_map():
            time.sleep(0.05 if running else 0)
            return
        for key, _ in selector.select(timeout=0.2):
            if not key.data.read():
                key.data.pipe.close()
