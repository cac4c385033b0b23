"""What each stage runs, in which order and for how long."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.processes import Job

#: Seconds of each stage in all; the third takes what is left.
SECONDS = {"A": 190.0, "B": 210.0, "C": 140.0}
#: Modules of lyapcuda.ops, whose ops stage A holds against the CPU backend, a process a module.
OP_MODULES = ("step", "newton", "products", "panel")
#: The sections of stage B, in order, and the seconds of each. What is slow to start comes last.
BENCHES = {
    "copy": 10,
    "ops": 40,
    "gpt": 35,
    "resnet18": 35,
    "panels": 60,
    "graphs": 10,
    "compiled": 60,
}
#: Parts of gpu/every_op.py: the sanitizers look at each in a process of its own.
PARTS = ("one vector", "k vectors", "Krylov vectors")
SANITIZER_FAULT = r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY: 0|Warning|RACECHECK SUMMARY: 0)"
#: On the CPU side, where many processes run side by side.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
#: Some of the binding's tests, for a rehearsal.
FEW = "reruns or not_finite"
#: Those that don't run on the CPU.
ELSEWHERE = "not [cpu"


@dataclass(frozen=True)
class Step:
    """Jobs that run side by side, so many at once."""

    jobs: Sequence[Job]
    at_once: int = 1


def module(name: str, *arguments: str | Path) -> list[str]:
    """The command of a module of this folder."""
    return [sys.executable, "-P", "-m", f"gpu.{name}", *map(str, arguments)]


def about(rehearse: bool) -> Step:
    """The extension imports, has CUDA, and this device runs its code."""
    arguments = ["--rehearse"] if rehearse else []
    return Step([Job("device", module("device", *arguments), 20)])


def stage_a(rehearse: bool) -> Iterator[Step]:
    """Is it right? (`about` comes before)"""
    tiny = ["--rehearse"] if rehearse else []
    yield Step(
        [
            Job(
                f"ops: {', '.join(names)}",
                module("ops_like_cpu", *names, *tiny),
                20 * len(names),
                environment=ONE_THREAD,
            )
            for names in apart(OP_MODULES, rehearse)
        ],
        at_once=4,
    )
    files = ["tests/ops/test_table.py", "tests/ops/test_cuda_runs.py"]
    jobs = [tests("tests: against the CPU", files, 100, rehearse, 10)]
    if not rehearse:  # which would skip them all
        gpu = ["tests/ops/test_gpu.py"]
        jobs.append(tests("tests: streams, graphs, models", gpu, 100, rehearse, 4))
    yield Step(jobs, at_once=2)
    yield Step(sanitizer("memcheck", 60, rehearse), at_once=len(PARTS))


def stage_b(rehearse: bool) -> Iterator[Step]:
    """How fast is it?"""
    tiny = ["--rehearse"] if rehearse else []
    for name, seconds in BENCHES.items():
        # The row in hand may still be finished.
        planned = {"seconds": 20.0 if rehearse else seconds, "grace": 10.0, "late": "enough"}
        yield Step([Job(name, module("sections", name, *tiny), **planned)])


def stage_c(rehearse: bool, counters: Path, right: bool) -> Iterator[Step]:
    """Do their threads race, and what do the kernels wait for? Counters only of right kernels."""
    yield Step(
        [*sanitizer("racecheck", 100, rehearse), *sanitizer("synccheck", 100, rehearse)],
        at_once=2 * len(PARTS),
    )
    yield Step([profile(counters, rehearse, None if right else "stage A failed")])


def tests(name: str, files: Sequence[str], seconds: float, rehearse: bool, workers: int) -> Job:
    """Tests on one library; every failure is a line at once, a hanging one among them. A rehearsal
    runs `FEW` of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "gpu.pytest_lines", *files]
    if has_module("pytest_timeout"):
        # By a thread: a call that waits for the device doesn't see signals.
        command += ["--timeout", "30", "--timeout-method", "thread"]
    if has_module("xdist") and not rehearse:
        workers = max(1, min(workers, (os.cpu_count() or 1) - 2))
        command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "64"]
    command += ["-k", f"{ELSEWHERE} and ({FEW})" if rehearse else ELSEWHERE]
    library = "simt copied" if rehearse else "cuda"
    environment = {"LYAPCUDA_TEST_LIBRARIES": library, **ONE_THREAD}
    # Nothing wrong as far as they came is no failure, but not the whole of it either.
    return Job(name, command, seconds, late="unfinished", environment=environment)


def apart(names: Sequence[str], rehearse: bool) -> list[Sequence[str]]:
    """The names that each process takes. One, so that a crash leaves the others alone; a rehearsal
    has one process for all of them, as loading torch is most of its time."""
    if rehearse:
        return [names] if names else []
    return [[name] for name in names]


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / name for home in homes if home]
    found = shutil.which(name) or next((place for place in places if place.exists()), None)
    return Path(found) if found else None


def sanitizer(name: str, seconds: float, rehearse: bool) -> list[Job]:
    """A tool of compute-sanitizer over every op, in parts side by side."""
    jobs, program = [], tool("compute-sanitizer")
    # Without a GPU all tools look at the same calls: a rehearsal makes them once.
    parts = () if rehearse and name != "memcheck" else PARTS
    # "lyapcuda" is in the mangled names of our kernels: torch's own stay out.
    front = [program, "--tool", name, "--error-exitcode", "9", "--kernel-regex", "kns=lyapcuda"]
    # Every tensor its own allocation: else an overrun stays within torch's block.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **ONE_THREAD}
    for some in apart(parts, rehearse):
        command = module("every_op", *some, *(["--rehearse"] if rehearse else []))
        missing = None
        if not rehearse and program is None:
            missing = "no compute-sanitizer on PATH or in CUDA_HOME"
        jobs.append(
            Job(
                f"{name}: {', '.join(some)}",
                command if rehearse or missing else [*front, *command],
                seconds * len(some),
                late="unfinished",
                fault=SANITIZER_FAULT,
                environment=alone,
                left_out=missing,
            )
        )
    return jobs


def profile(out: Path, rehearse: bool, left_out: str | None) -> Job:
    """Counters of six kernels, into a table."""
    command, program = module("counters", *(["--rehearse"] if rehearse else [])), tool("ncu")
    if not rehearse and program is None:
        left_out = left_out or "no ncu on PATH or in CUDA_HOME"
    if not rehearse:
        command += ["--ncu", str(program)]
    return Job("counters", [*command, "--csv", out], 40, 5, late="enough", left_out=left_out)
