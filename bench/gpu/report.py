"""The readable report of a run, from its lines: also of one that was cut off, or of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpu import goals
from gpu.tables import TABLES

Line = dict[str, Any]
#: Characters of a failing test's output that the report shows; the lines have all of it.
SHOWN = 1500
MEASURED = "\n## Ops against"


def latest(lines: Sequence[Line]) -> tuple[Line, list[Line], bool]:
    """(the last run, the lines of each stage in the last run that has some, whether it ended)"""
    runs: list[list[Line]] = []
    for line in lines:
        if line["kind"] == "run":
            runs.append([])
        if not runs:
            raise ValueError("no line begins a run: is this a file that gpu_check.sh wrote?")
        runs[-1].append(line)
    if not runs:
        raise ValueError("no lines: is this a file that gpu_check.sh wrote?")
    found: list[Line] = []
    for stage in ("A", "B", "C"):
        of_stage = [[line for line in run if line.get("stage") == stage] for run in runs]
        found += next((lines for lines in reversed(of_stage) if lines), [])
    return runs[-1][0], found, any(line["kind"] == "end" for line in runs[-1])


def markdown(lines: Sequence[Line]) -> str:
    """The whole report."""
    run, found, ended = latest(lines)
    kinds: dict[str, list[Line]] = {}
    for line in found:
        kinds.setdefault(line["kind"], []).append(line)
    rows = kinds.get("row", [])
    text = _title(run, ended) + _device(kinds.get("device", []))
    text += _failures(kinds) + ["## Goals", "", *goals.table(rows, run["rehearsal"]), ""]
    text += ["## How it ended", "", *_ends(kinds), ""]
    text += _ops(kinds.get("op", []))
    for name, table in TABLES.items():
        if of_table := [row for row in rows if row["table"] == name]:
            text += table.markdown(of_table)
    if notes := kinds.get("note", []):
        text += ["## Notes", "", *(f"- {line['process']}: {line['text']}" for line in notes), ""]
    return "\n".join([*text, "Made by `bench/gpu_check.sh`.", ""])


def summary(text: str) -> str:
    """The part of a report before its tables of measurements."""
    return text.split(MEASURED)[0].split("\nMade by")[0].strip()


def _title(run: Line, ended: bool) -> list[str]:
    title = [f"# GPU checks and measurements: {run['device']}", ""]
    if run["rehearsal"]:
        title = ["# REHEARSAL of the GPU checks", ""]
        title += ["Made-up times, on the CPU. Nothing here was measured.", ""]
    if not ended:
        title += ["This run was cut off: here is what it had found.", ""]
    return title


def _device(found: Sequence[Line]) -> list[str]:
    if not found:
        return []
    about = {name: value for name, value in found[-1]["about"].items() if value is not None}
    return [", ".join(f"{name}: {value}" for name, value in about.items()), ""]


def _failures(kinds: dict[str, list[Line]]) -> list[str]:
    """What is wrong, each with its output: that of a process where no line of its own tells."""
    text: list[str] = []
    told: set[str] = set()
    for line in kinds.get("op", []):
        if not line["right"]:
            told.add(line["process"])
            text += [f"### {line['op']}", "", *_quoted(line["fault"])]
    for line in kinds.get("test", []):
        told.add(line["process"])
        text += [f"### {line['test']} ({line['when']})", "", *_quoted(line["output"])]
    for line in kinds.get("process", []):
        if line["outcome"] == "failed" and line["process"] not in told:
            text += [f"### {line['stage']}, {line['process']}: {line['status']}", ""]
            text += _quoted(line.get("output", ""))
    return ["## Failures", "", *text] if text else []


def _quoted(output: str) -> list[str]:
    # Its own fences would end ours.
    return ["````", output.strip()[-SHOWN:], "````", ""]


def _ends(kinds: dict[str, list[Line]]) -> list[str]:
    counts = {line["process"]: line["counts"] for line in kinds.get("tests", [])}
    calls: Counter[str] = Counter()
    for line in kinds.get("calls", []):
        calls[line["process"]] += line["count"]
    lines = ["| stage | process | how it ended | seconds |", "|---|---|---|---|"]
    for line in kinds.get("process", []):
        status, name = line["status"], line["process"]
        if name in counts:
            counted = ", ".join(f"{count} {what}" for what, count in counts[name].items())
            status += f" ({counted})"
        if name in calls:
            status += f" ({calls[name]} calls)"
        lines.append(f"| {line['stage']} | {name} | {status} | {line['seconds']:.0f} |")
    for line in kinds.get("stage", []):
        lines.append(
            f"| {line['stage']} | the whole | {line['status']} | {line.get('seconds', 0):.0f} |"
        )
    return lines


def _ops(found: Sequence[Line]) -> list[str]:
    if not found:
        return []
    lines = ["## Ops against the CPU backend", "", "| op | cases | right |", "|---|---|---|"]
    for line in found:
        right = "yes" if line["right"] else "no"
        lines.append(f"| {line['op']} | {line['cases']} | {right} |")
    return [*lines, ""]
