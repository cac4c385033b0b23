"""How long `import lyapcuda` takes over `import torch`, and what it imports.

    python bench/import_time.py [--runs 21] [--out bench/results/import_time.md]

Each run is a fresh interpreter that imports torch, then lyapcuda. The first one's time, which
compiles the bytecode and reads the files from disk, isn't counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from import_cost import IMPORTS  # noqa: E402


def imported() -> tuple[float, float, int, list[str]]:
    """(seconds of torch, seconds of lyapcuda over it, modules it brought, their packages)."""
    told = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    return json.loads(told.stdout)


def slowest(count: int) -> list[tuple[float, str]]:
    """(milliseconds, name) of lyapcuda's slowest modules, without what they import themselves.

    Without garbage collections: one of torch's objects would be counted to some module.
    """
    code = "import gc; gc.disable(); import torch, lyapcuda"
    command = [sys.executable, "-X", "importtime", "-c", code]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = [line.removeprefix("import time:").split("|") for line in told.splitlines()[1:]]
    own = [(int(row[0]) / 1e3, row[2].strip()) for row in rows if "lyapcuda" in row[2]]
    return sorted(own, reverse=True)[:count]


def report(runs: int) -> list[str]:
    imported()
    seconds = [imported() for _ in range(runs)]
    of_torch, over = ([run[i] for run in seconds] for i in (0, 1))
    _, _, modules, packages = seconds[0]
    lines = ["# What `import lyapcuda` takes", ""]
    lines += [
        f"Machine: {cpu_name()}, torch {torch.__version__}, Python {platform.python_version()}.",
        f"Medians and ranges of {runs} fresh interpreters. `python bench/import_time.py`.",
        "",
    ]
    lines += ["| import | seconds | from | to |", "|---|---|---|---|"]
    for name, values in (("torch", of_torch), ("lyapcuda, after torch", over)):
        found = (statistics.median(values), min(values), max(values))
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
    beside = ", ".join(packages)
    lines += ["", f"It brings {modules} modules. Those not of the standard library: {beside}.", ""]
    lines += ["| its slowest modules, without garbage collections | milliseconds |", "|---|---|"]
    return [*lines, *(f"| `{name}` | {value:.1f} |" for value, name in slowest(5))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--out", type=Path, help="write the report there")
    options = parser.parse_args()
    text = "\n".join(report(options.runs)) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
