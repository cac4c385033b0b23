"""Six kernels under ncu: how busy the memory is, registers, and what their warps wait for.

    python -m gpu.counters --ncu ncu --csv OUT.csv        # a row a kernel, from ncu's table
    python -m gpu.counters                                # the calls themselves

Clocks are left as they are (--clock-control none).
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu import panels, vectors
from gpu.lines import Lines
from gpu.stages import module
from gpu.timing import Bench, Call

#: Sections of ncu that hold what the table shows.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
#: The table's columns: patterns of ncu's names, the first that is there, and the unit shown.
COLUMNS = {
    "dram %": r"^(gpu__)?dram_*throughput\.avg\.pct_of_peak_sustained_elapsed$",
    "registers": r"^launch__registers_per_thread$",
    "warps %": r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",
}
TIME = r"^gpu__time_duration\.(sum|avg)$"
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
STALL = re.compile(r"average_warps?_issue_stalled_(?P<why>\w+?)_per_issue_active\.ratio$")


def calls(bench: Bench) -> dict[str, Call]:
    """Six kernels on data well past any cache."""
    n = 1003 if bench.rehearse else 10**8
    one = vectors.separation_calls(bench, n, torch.float32)
    found = {name: one[name] for name in ("ascent_", "recenter_")}
    shorter = n if bench.rehearse else n // 5
    for k in (14, 2):
        jobs = panels.panel_jobs(bench, shorter, k, panels.EAGER)
        for name in ("ascent_", "recenter_")[: 2 if k == 14 else 1]:
            found[f"{name}, k = {k}"] = jobs[name].ours
        if k == 14:
            found["gram, k = 14"] = jobs["gram"].ours
    return found


def run_calls(rehearse: bool) -> None:
    """Warms up, then each once, between the marks that ncu starts and stops at."""
    found = calls(Bench(Lines(), rehearse))
    for _ in range(1 if rehearse else 2):
        for call in found.values():
            call()
    if rehearse:
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in found.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def command(ncu: str) -> list[str]:
    sections = [word for section in SECTIONS for word in ("--section", section)]
    # Names with their namespaces: torch's kernels stay out.
    names = ["--kernel-name-base", "demangled", "--kernel-name", "regex:lyapcuda"]
    front = [ncu, "--clock-control", "none", "--profile-from-start", "off", *sections, *names]
    return [*front, "--csv", "--page", "raw", *module("counters")]


def rows(text: str) -> Iterator[dict[str, Any]]:
    """Each kernel's numbers, from what ``ncu --csv --page raw`` prints: names, units, kernels."""
    # ncu's own messages stand around the table.
    table = [line for line in text.splitlines() if line.startswith('"')]
    parsed = list(csv.reader(table))
    if len(parsed) < 3:
        return
    names, units = parsed[:2]
    for values in parsed[2:]:
        row = dict(zip(names, values, strict=False))
        kernel = re.search(r"(\w+)(<.*>)?\(", row.get("Kernel Name", ""))
        found: dict[str, Any] = {"kernel": kernel[1] if kernel else row.get("Kernel Name", "?")}
        found |= {"grid": row.get("Grid Size"), "block": row.get("Block Size")}
        for column, pattern in COLUMNS.items():
            name = next((name for name in names if re.search(pattern, name)), None)
            if name and (value := number(row[name])) is not None:
                found[column] = value
        for name, unit in zip(names, units, strict=False):
            value = number(row[name])
            if re.search(TIME, name) and unit in MICROSECONDS and value is not None:
                found["µs"] = value * MICROSECONDS[unit]
        found["stalls"] = stalls(row)
        yield found


def stalls(row: dict[str, str]) -> list[str]:
    """The three reasons that warps wait for most, in cycles an instruction."""
    why: dict[str, float] = {}
    for name, text in row.items():
        match, value = STALL.search(name), number(text)
        if match and value is not None:
            why.setdefault(match["why"], value)
    most = sorted(why.items(), key=lambda item: -item[1])[:3]
    return [f"{name} {value:.1f}" for name, value in most]


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


#: What ncu prints, cut to a few columns: a rehearsal reads it.
SAMPLE = """==PROF== Connected to process 1
"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","launch__registers_per_thread",\
"sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","","","us","%","register/thread","%","inst","inst"
"0","void lyapcuda::kernels::ascent<float, float>(Args<float>)","(256, 1, 1)","(528, 1, 1)",\
"1,063.20","93.1","40","71.5","22.9","0.8"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ncu", help="the program")
    parser.add_argument("--csv", type=Path, help="what ncu prints goes here too")
    parser.add_argument("--rehearse", action="store_true", help="without ncu and a GPU")
    options = parser.parse_args()
    if options.csv is None:
        run_calls(rehearse=False)
        return
    if options.rehearse:
        run_calls(rehearse=True)
        text = SAMPLE
    else:
        done = subprocess.run(command(options.ncu), stdout=subprocess.PIPE, text=True)
        text = done.stdout
    options.csv.write_text(text)
    lines, count = Lines.of_environment(), 0
    for row in rows(text):
        lines.write("row", table="counters", **row)
        count += 1
    if not count:
        sys.exit(f"ncu printed no table:\n{text[-3000:]}")


if __name__ == "__main__":
    main()
