"""Runs the stages of bench/gpu_check.sh, which says how it is called."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from gpu import building, report, stages
from gpu.lines import Lines, end_last_line, read
from gpu.processes import ROOT, Ended, Job, run
from gpu.stages import Step

#: A rehearsal gives everything so many times as long.
PATIENCE = 10
RESULTS = ROOT / "bench" / "results"
ASK = (
    "import torch\n"
    "if torch.cuda.is_available():\n"
    "    print(torch.cuda.get_device_name(0))\n"
    "    print(*torch.cuda.get_device_capability(0), sep='.')"
)


@dataclass
class Check:
    """One run: its stages, and how their jobs ended."""

    rehearse: bool
    out: Path
    stem: str
    architecture: str
    end: float
    build: bool = True
    failed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def path(self, end: str) -> Path:
        return self.out / f"{self.stem}{end}"

    def run(self, wanted: Iterable[str], about: dict[str, object]) -> int:
        """The exit status. Whatever ends it early, the report is written of what there is."""
        lines = Lines(str(self.path(".jsonl")))
        end_last_line(self.path(".jsonl"))
        wanted = sorted(wanted)
        lines.write("run", stages=wanted, rehearsal=self.rehearse, **about)
        try:
            with self.path(".log").open("ab") as log:
                for stage in wanted:
                    self._stage(stage, wanted, Lines(lines.path, stage), log)
            status = int(bool(self.failed or self.unfinished))
            lines.write("end", status=status, failed=self.failed, unfinished=self.unfinished)
        finally:
            text = report.markdown(read([self.path(".jsonl")]))
            self.path(".md").write_text(text)
        print(report.summary(text))
        return status

    def _stage(self, stage: str, wanted: list[str], lines: Lines, log: BinaryIO) -> None:
        start = time.monotonic()
        end = min(self.end, start + self._seconds(stage))
        right = "A" in wanted and not self.failed
        if stage == "B" and not right:
            why = "stage A failed" if "A" in wanted else "stage A was not run"
            lines.write("stage", outcome="left out", status=f"left out: {why}")
            print(f"B: left out: {why}", flush=True)
            if "A" not in wanted:
                self.failed.append(f"B: left out: {why}")
            return
        steps: Iterable[Step]
        if stage == "A":
            if not self._ready(lines, end, log):
                return
            # What the build took isn't taken from the checks.
            end = min(self.end, time.monotonic() + self._seconds(stage))
            steps = stages.stage_a(self.rehearse)
        elif stage == "B":
            steps = stages.stage_b(self.rehearse)
        else:
            steps = stages.stage_c(self.rehearse, self.path("_counters.csv"), not self.failed)
        for step in steps:
            self._step(step, lines, end, log)
        took = round(time.monotonic() - start, 1)
        lines.write("stage", outcome="ended", status=f"took {took:.0f} s", seconds=took)

    def _seconds(self, stage: str) -> float:
        return stages.SECONDS[stage] * (PATIENCE if self.rehearse else 1)

    def _ready(self, lines: Lines, end: float, log: BinaryIO) -> bool:
        """Whether the extension runs here, built where it didn't."""
        about = stages.about(self.rehearse)
        if self.rehearse:
            if self.build:
                self._build(lines, log, ROOT / "build" / "gpu_check")
        else:
            tried = list(run(about.jobs, 1, end, lines, log))
            if tried[0].outcome == "passed" or not self.build:
                self._take(tried[0], lines)
                return tried[0].outcome == "passed"
            lines.write("note", text=f"built here, as the extension did not run: {tried[0].status}")
            if not self._build(lines, log):
                return False
            end = min(self.end, time.monotonic() + self._seconds("A"))
        return self._step(about, lines, end, log)

    def _build(self, lines: Lines, log: BinaryIO, out: Path | None = None) -> bool:
        missing = building.missing_for_build()
        job = Job(
            "build",
            building.build_command(sys.executable, self.architecture, out),
            300 if self.rehearse else 150,
            environment=building.build_environment(sys.executable),
            # A rehearsal does what can be done here; elsewhere the command says what it lacks.
            left_out=missing if self.rehearse else None,
        )
        return self._step(Step([job]), lines, self.end, log)

    def _step(self, step: Step, lines: Lines, end: float, log: BinaryIO) -> bool:
        """Runs it; True where nothing of it failed."""
        right, jobs = True, step.jobs
        if self.rehearse:  # beside other work
            jobs = [
                replace(
                    job,
                    seconds=PATIENCE * job.seconds,
                    environment={**job.environment, **stages.ONE_THREAD},
                )
                for job in jobs
            ]
        for ended in run(jobs, step.at_once, end, lines, log):
            self._take(ended, lines)
            right = right and ended.outcome != "failed"
        return right

    def _take(self, ended: Ended, lines: Lines) -> None:
        values = {"outcome": ended.outcome, "status": ended.status, "seconds": ended.seconds}
        if ended.outcome in ("failed", "unfinished"):
            where = self.failed if ended.outcome == "failed" else self.unfinished
            where.append(f"{lines.stage}, {ended.job.name}: {ended.status}")
            values["output"] = ended.tail
        Lines(lines.path, lines.stage, ended.job.name).write("process", **values)
        print(
            f"{lines.stage}, {ended.job.name}: {ended.status} ({ended.seconds:.0f} s)", flush=True
        )


def the_gpu() -> tuple[str, str] | None:
    """(name, architecture) of the GPU that this Python's torch can use."""
    try:
        told = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        sys.exit("gpu_check: torch did not say within two minutes whether there is a GPU")
    if told.returncode != 0:
        sys.exit(f"gpu_check: torch does not import:\n{told.stderr.strip()[-1500:]}")
    name, _, architecture = told.stdout.strip().rpartition("\n")
    return (name, architecture) if name else None


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results")
    add("--stage", action="append", choices=list(stages.SECONDS), help="default: all")
    add("--no-build", action="store_true", help="only the extension that is there")
    add("--seconds", type=float, default=540.0, help="for all of it (default %(default)g)")
    add("--rehearse", type=Path, metavar="FOLDER", help="without a GPU, tiny, into FOLDER")
    add("--report", type=Path, nargs="+", metavar="FILE", help="write the first one's .md anew")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    start = time.monotonic()
    if options.report:
        target = options.report[0].with_suffix(".md")
        try:
            text = report.markdown(read(options.report))
        except (OSError, ValueError) as error:
            sys.exit(f"gpu_check: --report: {error}")
        target.write_text(text)
        print(target)
        return 0
    wanted = set(options.stage or stages.SECONDS)
    rehearse = options.rehearse is not None
    out = (options.rehearse if rehearse else options.out).resolve()
    if rehearse and out == RESULTS:
        sys.exit("gpu_check: a rehearsal doesn't belong in bench/results: name another folder")
    stem, name, architecture = "rehearsal", "CPU (rehearsal)", "9.0"
    if not rehearse:
        found = the_gpu()
        if found is None:
            print(
                f"gpu_check: no GPU that the torch of {sys.executable} can use; "
                "--rehearse FOLDER needs none",
                file=sys.stderr,
            )
            return 2
        name, architecture = found
        stem = "gpu_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    out.mkdir(parents=True, exist_ok=True)
    # `timeout` and the like end it so: the report is written all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = start + options.seconds - 5  # for the report itself
    check = Check(rehearse, out, stem, architecture, end, build=not options.no_build)
    return check.run(wanted, {"device": name, "architecture": architecture})


if __name__ == "__main__":
    sys.exit(main())
