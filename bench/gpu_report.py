"""Checks and benches of the CUDA backend, each in a process of its own, in one report.

    bash bench/gpu_check.sh        # see there

Sections have time budgets; what doesn't fit into the whole is left out, with a note in the report.
A check (build, tests, compute-sanitizer) that fails or doesn't end makes the exit status 1; so does
a bench that ends with an error. The benches run alone, the checks beside one another.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: Bench sections of gpu_sections.py, in order of importance, and the seconds each plans with.
BENCHES = {"device": 10, "ops": 90, "resnet18": 25, "gpt": 35, "panels": 90, "graphs": 15}


@dataclass
class Section:
    """One process: what it is, how it ended, the last lines of what it printed."""

    name: str
    command: list[str]
    seconds: float
    check: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    result: Path | None = None
    status: str = "not started"
    took: float = 0.0
    tail: str = ""

    @property
    def failed(self) -> bool:
        # A bench that ran out of time has left its rows; a check has told nothing.
        wrong = ("failed", "out of time") if self.check else ("failed",)
        return self.status.startswith(wrong)

    def as_json(self) -> dict[str, object]:
        out = {"name": self.name, "status": self.status, "seconds": round(self.took, 1)}
        out["command"] = " ".join(self.command)
        if self.failed:
            out["output"] = self.tail
        if self.result is not None and self.result.exists():
            out |= json.loads(self.result.read_text())
        return out


def run_together(sections: list[Section], end: float) -> None:
    """Runs sections side by side, each until its budget or the end of the whole."""
    running = []
    for section in sections:
        left = end - time.monotonic()
        if section.status != "not started":
            continue
        if left < 5:
            section.status = "left out: no time"
            continue
        log = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            section.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **section.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.append((section, process, log, time.monotonic(), min(section.seconds, left)))
    for section, process, log, start, seconds in running:
        try:
            code = process.wait(max(0.1, start + seconds - time.monotonic()))
            section.status = "passed" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            section.status = f"out of time: stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait()
        section.took = time.monotonic() - start
        log.seek(0)
        section.tail = log.read()[-4000:]
        log.close()
        print(f"{section.name}: {section.status} ({section.took:.0f} s)", flush=True)
        if section.failed:
            print(section.tail, flush=True)


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def ours(sanitizer: str) -> list[str]:
    """The option that leaves torch's own kernels out; its name differs between versions."""
    if not Path(sanitizer).exists():
        return []
    text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-regex", "--kernel-name", "--filter"):
        if option in text:
            return [option, "kns=lyapcuda"]
    return []


def plan(folder: Path, rehearse: bool, budgets: dict[str, float]) -> list[list[Section]]:
    """The sections in the groups that run together."""
    python = sys.executable
    jobs = str(os.cpu_count() or 1)
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "140"]
    if rehearse:
        build, tests = [python, "setup.py", "--version"], [*tests, "tests/test_stream_copy.py"]
    elif has_module("xdist"):
        tests += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 3)))]
    once = "import sys; sys.path.insert(0, 'tests'); import simt_library; simt_library.build()"
    groups = [
        [Section("build", build, 150, environment={"LYAPCUDA_CUDA": "1", "MAX_JOBS": jobs})],
        [Section("emulated library for the tests", [python, "-c", once], 120)],
        [Section("tests", tests, 150, environment={"OMP_NUM_THREADS": "1"})],
    ]
    if rehearse:
        groups[0][0].environment = {"LYAPCUDA_CUDA": "0"}
    for tool in SANITIZERS:
        driver = [python, "bench/gpu_kernels.py", *(["--rehearse"] if rehearse else [])]
        # Every tensor its own allocation: else an overrun stays within torch's block.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        section = Section(f"compute-sanitizer {tool}", driver, 150, environment=alone)
        if not rehearse:
            path = shutil.which("compute-sanitizer") or str(
                Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
            )
            if not Path(path).exists():
                section.status = "left out: no compute-sanitizer on PATH or in CUDA_HOME"
            section.command = [path, "--tool", tool, "--error-exitcode", "9", *ours(path), *driver]
        groups[2].append(section)
    for name, seconds in BENCHES.items():
        seconds = budgets.get(name, seconds)
        result = folder / f"{name}.json"
        command = [python, "bench/gpu_sections.py", name, "--out", str(result)]
        command += ["--seconds", str(seconds)] + (["--rehearse"] if rehearse else [])
        # Time for the start and for the row in hand beyond what the section plans with.
        groups.append([Section(name, command, seconds + 30, check=False, result=result)])
    return groups


def markdown(sections: list[Section], title: str, rehearse: bool) -> str:
    lines = [f"# {title}", ""]
    if rehearse:
        lines += ["REHEARSAL: made-up times, on the CPU. Nothing here was measured.", ""]
    lines += ["| section | how it ended | seconds |", "|---|---|---|"]
    lines += [f"| {s.name} | {s.status} | {s.took:.0f} |" for s in sections]
    for section in sections:
        if section.check and section.failed:
            lines += ["", f"## {section.name}", "", "```", section.tail[-1500:].strip(), "```"]
        if section.result is not None and section.result.exists():
            found = json.loads(section.result.read_text())
            lines += ["", f"## {section.name}", "", *found["markdown"]]
            lines += ["", *found["notes"]] if found["notes"] else []
            if section.failed:
                lines += ["", "```", section.tail[-1500:].strip(), "```"]
    passed = next((s.tail for s in sections if s.name == "tests"), "")
    counts = re.findall(r"^.*\d+ (?:passed|failed|error).* in .*$", passed, re.MULTILINE)
    if counts:
        lines += ["", f"Tests: {counts[-1].strip('= ')}"]
    return "\n".join([*lines, "", "Made by `bench/gpu_check.sh`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="sections by name")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="without a GPU, tiny")
    options = parser.parse_args()
    rehearse = options.rehearse is not None
    out = options.rehearse if rehearse else options.out
    if rehearse and out.resolve() == (ROOT / "bench" / "results").resolve():
        sys.exit("gpu_report: a rehearsal doesn't belong in bench/results")
    end = time.monotonic() + options.seconds - 5  # for the report itself
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        budgets = dict.fromkeys(BENCHES, 5.0) if rehearse else {}
        groups = plan(Path(folder), rehearse, budgets)
        sections = [section for group in groups for section in group]
        if options.only:
            unknown = set(options.only) - {section.name for section in sections}
            if unknown:
                sys.exit(f"gpu_report: no such section: {', '.join(sorted(unknown))}")
        for group in groups:
            for section in group:
                if options.only and section.name not in options.only:
                    section.status = "left out: not asked for"
                elif sections[0].failed:
                    section.status = "left out: the build failed"
            run_together(group, end)
        device = next(s for s in sections if s.name == "device")
        about = json.loads(device.result.read_text())["rows"][0] if device.result.exists() else {}
        name = about.get("device", "unknown device")
        stem = "rehearsal" if rehearse else "gpu_" + re.sub(r"\W+", "_", name.lower())
        title = "REHEARSAL of the GPU checks" if rehearse else f"GPU checks and benches: {name}"
        report = {"rehearsal": rehearse, "device": name, "sections": []}
        report["sections"] = [section.as_json() for section in sections]
        (out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
        text = markdown(sections, title, rehearse)
        (out / f"{stem}.md").write_text(text)
        print(text)
    sys.exit(1 if any(section.failed for section in sections) else 0)


if __name__ == "__main__":
    main()
