"""One tool on one problem in a process of its own: requests in, answers out."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from peers_problems import Problem, load, prepare
from peers_tools import TOOLS, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from resident_memory import be_frugal, peak_memory  # noqa: E402

# A gradient is timed for at least so many seconds at a go.
_LEAST = 0.2

# Its children are forked from a process that has imported torch but has run nothing yet.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["peers_worker"])


class OutOfTime(Exception):
    """No answer when the time was up; the process has been ended."""


class Worker:
    """The parent's side: a process, and its answers.

    Args:
        kind: what the process does: "prepare", "reference", "gradient", or a tool's name.
        name, path: of the problem.
        threads: of torch.
        frugal: for memory instead of time: malloc gives back what is freed.
        extra: see `_once`.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        path: Path,
        threads: int,
        frugal: bool = False,
        extra: Any = None,
    ) -> None:
        self.connection, other = _SERVER.Pipe()
        arguments = (other, kind, name, path, threads, frugal, extra)
        self.process = _SERVER.Process(target=_main, args=arguments, daemon=True)
        self.process.start()
        other.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def answer(self, end: float) -> dict[str, Any]:
        """The next answer, until the monotonic time ``end``.

        Raises:
            OutOfTime: there was none.
            RuntimeError: the process has died.
        """
        if not self.connection.poll(max(0.0, end - time.monotonic())):
            self.process.kill()
            raise OutOfTime
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from None

    def ask(self, end: float, **request: Any) -> dict[str, Any]:
        """Runs the tool once: k, setting (its number) and seed.

        Returns:
            seconds, cpu (of all threads), values, forward and backward passes, peak (bytes of
            resident memory above those before the call; for a frugal process on Linux); or error.
        """
        self.connection.send(request)
        return self.answer(end)


class Passes:
    """Counts the model's forward passes and the autograd engine's runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        model.register_forward_pre_hook(self._enter)
        engine = torch.autograd._engine_run_backward

        def counted(*args: Any, **options: Any) -> Any:
            self.backward += 1
            return engine(*args, **options)

        torch.autograd._engine_run_backward = counted

    def _enter(self, *_: Any) -> None:
        self.forward += 1


def _gradient(problem: Problem, seconds: float = 0.0) -> int:
    """Plain gradients for so many seconds; returns how many."""
    end, count = time.perf_counter() + seconds, 0
    while count == 0 or time.perf_counter() < end:
        problem.reset()
        problem.loss().backward()
        count += 1
    return count


def _run(
    problem: Problem, tool: str, passes: Passes, frugal: bool, request: dict[str, Any]
) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    problem.reset()
    passes.forward = passes.backward = 0
    with peak_memory() if frugal else nullcontext() as peak:
        start, cpu, calls = time.perf_counter(), time.process_time(), 1
        if tool == "gradient":
            calls = _gradient(problem, 0.0 if frugal else _LEAST)
        else:
            setting = TOOLS[tool].settings[request["setting"]]
            found = TOOLS[tool].run(problem, request["k"], setting, request["seed"])
            values = [float(value) for value in found]
        answer["seconds"] = (time.perf_counter() - start) / calls
        answer["cpu"] = (time.process_time() - cpu) / calls
    if peak is not None:
        answer["peak"] = peak.bytes
    if tool != "gradient":
        answer["values"] = sorted(values, key=lambda v: -abs(v) if math.isfinite(v) else 0.0)
    return answer | {"forward": passes.forward, "backward": passes.backward}


def _attempt(problem: Problem, *arguments: Any) -> dict[str, Any]:
    try:
        return _run(problem, *arguments)
    except Exception as error:  # whatever a tool raises belongs into the report
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
    finally:
        problem.reset()


def _once(kind: str, name: str, path: Path, extra: Any) -> dict[str, Any]:
    """Makes a problem's file (``extra``: the data's folder or None), or its truth (how many)."""
    if kind == "prepare":
        return prepare(name, extra, path)
    return reference(load(name, path), extra)


def _main(
    connection: Connection,
    kind: str,
    name: str,
    path: Path,
    threads: int,
    frugal: bool,
    extra: Any,
) -> None:
    # Progress bars and warnings of all these tools are no part of the report.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(threads)
    frugal = frugal and sys.platform == "linux"
    if frugal:
        be_frugal()
    try:
        if kind in ("prepare", "reference"):
            connection.send(_once(kind, name, path, extra))
            return
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {error}"[:300]})
        return
    problem = load(name, path)
    passes = Passes(problem.model)
    _gradient(problem)
    if kind != "gradient":  # libraries load, thread pools start
        _attempt(problem, kind, passes, frugal, {"k": 1, "setting": 0, "seed": 0})
    connection.send({"ready": True})
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(problem, kind, passes, frugal, request))
