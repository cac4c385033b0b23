"""Counts of what was tried against the package, in one command:

    python bench/robustness.py [--out bench/results/robustness.md] [--quick]

Damaged files for the readers (1e5), hypothesis's examples for every op, a soak of 10,000 steps, and
the table of faults in docs/faults.md. Ends with an error where anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("support", "ops", "")] + [str(ROOT)]
FILES = {"bin": 40_000, "pickle": 50_000, "checkpoint": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="a file for the report (default: only print)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of it")
    arguments = parser.parse_args()
    share = 100 if arguments.quick else 1
    torch.set_num_threads(1)
    os.environ["LYAPCUDA_EXAMPLES"] = str(1000 // (20 if arguments.quick else 1))
    rows = ["| tried | count | outcome |", "|---|---|---|"]
    print("\n".join(rows), flush=True)

    def report(what: str, count: int, outcome: str) -> None:
        rows.append(f"| {what} | {count:,} | {outcome} |")
        print(rows[-1], flush=True)

    import test_table

    import fuzz
    import soak

    total = 0
    for kind, count in FILES.items():
        found = fuzz.fuzz(kind, count // share, seed=1)
        total += count // share
        report(
            f"damaged files, {kind}",
            count // share,
            f"{found['refused']:,} refused, {found['read']:,} read right, nothing run",
        )
    report("damaged files, all", total, "no crash, no other exception")
    examples = int(os.environ["LYAPCUDA_EXAMPLES"])
    for row in test_table.ROWS:
        test_table.test_anything("cpu", row)
    count = len(test_table.ROWS)
    report(
        "examples of hypothesis", examples * count, f"{count} ops, {examples} each: the oracles'"
    )
    found = soak.soak(10_000 // share)
    grown = found.memory[1] - found.memory[0]
    report(
        "steps of the soak",
        found.steps,
        f"resident memory {found.memory[1] / 2**20:.0f} MiB, {grown / 2**10:+.0f} KiB since a "
        f"tenth of the way; living tensors {found.tensors[0]} and {found.tensors[1]}",
    )
    if found.tensors[0] != found.tensors[1] or grown > 4 << 20:
        sys.exit("the soak's memory is not flat")
    faults = ROOT / "docs" / "faults.md"
    if faults.exists():
        listed = re.findall(r"^\|.*\btest_\w+.*\|$", faults.read_text(), re.MULTILINE)
        report("faults (docs/faults.md)", len(listed), "each a test: pytest tests/faults")
    if arguments.out:
        header = "# Robustness\n\n`python bench/robustness.py`" + " --quick" * arguments.quick
        header += f", torch {torch.__version__}, Python {platform.python_version()}.\n\n"
        arguments.out.write_text(header + "\n".join(rows) + "\n")


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
