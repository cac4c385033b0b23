"""``lyapcuda plot``: the picture of a run, from its log."""

from __future__ import annotations

import argparse
from pathlib import Path

from lyapcuda.plots.run import read_run, save_run

__all__ = ["add_arguments"]

#: What matplotlib writes, by suffix.
FORMATS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Draws the logs of CurvatureLog: the curvature and what is stable, the edge, the loss and "
        "the learning rate, as far as they are logged. Several runs share one picture."
    )
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="a .csv or .jsonl file of CurvatureLog")
    add("-o", "--out", type=Path, metavar="PATH", help="of the picture (default: LOG as .png)")
    add("--dpi", type=int, default=150, help="default 150")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    logs: list[Path] = arguments.logs
    out = arguments.out or logs[0].with_suffix(".png")
    if out.suffix not in FORMATS:
        raise ValueError(f"--out={out}: expected a name that ends in {', '.join(FORMATS)}")
    if not 20 <= arguments.dpi <= 1200:
        raise ValueError(f"--dpi={arguments.dpi}: expected 20 to 1200")
    names = [_name(log, logs) for log in logs]
    if len({*names}) < len(logs):
        names = [str(log) for log in logs]
    runs = {name: read_run(log) for name, log in zip(names, logs, strict=True)}
    save_run(next(iter(runs.values())) if len(runs) == 1 else runs, out, arguments.dpi)
    print(out)
    return 0


def _name(log: Path, logs: list[Path]) -> str:
    """Of a run among several: its file's, or its folder's where files are named alike."""
    alike = sum(other.stem == log.stem for other in logs) > 1
    return str(log.parent) if alike else log.stem
