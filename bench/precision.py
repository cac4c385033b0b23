"""Errors of trackers, LyapunovSGD and eigsh by the type, compiler and kernel of the loss:
python bench/precision.py [--out bench/results/precision.md]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import precision_cases as cases  # noqa: E402
from ops import cpu_name  # noqa: E402

HEADER = """# Errors by precision, compiler and kernel

`python bench/precision.py`, {cpu}, one thread, torch {torch}. Small smooth nets with cross-entropy,
against the dense Hessian in float64 of the same loss at the same (rounded) parameters. Errors of
eigenvalues are relative to h0: of h0 (k = 1), the largest of h0..h2 (k = 3; eigsh at its default
tol = 1e-3), of h0 and hN (both ends), after 60 steps; LyapunovSGD: of its learning rate 1/h0 after
the warm-up (stable to 5e-3), and of its first step against −lr·g in float64. `(!)`: an interval
held no eigenvalue.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a file for the report (default: only print)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = ["| loss | " + " | ".join(cases.METHODS) + " |", "|---" * (len(cases.METHODS) + 1) + "|"]
    print("\n".join(rows), flush=True)
    for name, build in {**cases.PRECISIONS, **cases.COMPILERS}.items():
        if arguments.only not in name:
            continue
        start = time.perf_counter()
        found, cells = cases.errors(build()), []
        for method in cases.METHODS:
            error, inside = found[method]
            cells.append(f"{error:.1e}" + ("" if inside else " (!)"))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
        print(rows[-1], f"{time.perf_counter() - start:.1f} s", flush=True)
    if arguments.out:
        arguments.out.write_text(
            HEADER.format(cpu=cpu_name(), torch=torch.__version__) + "\n".join(rows) + "\n"
        )


if __name__ == "__main__":
    main()
