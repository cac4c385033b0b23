"""``python -m examples.paper figures``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lyapcuda.command.program import EXIT_INTERRUPTED, set_threads

from ..data import DIGITS
from .table import FIGURES, Spectrum, scale_of

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Run figures of the paper; writes figN.png, figN.json (the claim by numbers) and, under "
        "panels/, the runs' CSVs. A panel that is there already isn't run again, and one that was "
        "interrupted goes on. The paper's data is CIFAR-10; without --data, the digits of "
        "scikit-learn stand in for it, all ten classes."
    )
    add = parser.add_argument
    add("figures", nargs="*", metavar="FIG", help="1 to 10, or all")
    add("--list", action="store_true", help="say what each figure shows, and its runs")
    add(
        "--data", default=DIGITS, metavar="digits|DIR", help="digits (default) or CIFAR-10's folder"
    )
    add("--quick", action="store_true", help="minutes on two cores instead of the paper's scale")
    add("--epochs", type=int, metavar="N", help="of every run, instead of the scale's")
    add("--max-steps", type=int, metavar="N", help="of every run")
    add("--batch-size", type=int, metavar="N", help="of every run")
    add("--seed", type=int, default=0, help="default 0")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="default runs/paper")
    add("--overwrite", action="store_true", help="run these figures' panels anew")
    add("--draw-only", action="store_true", help="run nothing: draw the panels that are there")
    add("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)


def chosen(names: list[str]) -> list[int]:
    """The figures that arguments name, each once, in their order.

    Raises:
        ValueError: none, or one that isn't 1 to 10 or ``all``.
    """
    if not names:
        raise ValueError(f"FIG is missing: give 1 to {max(FIGURES)}, or {ALL}")
    found: list[int] = []
    for name in names:
        if name != ALL and not (name.isdecimal() and int(name) in FIGURES):
            raise ValueError(f"FIG must be 1 to {max(FIGURES)}, or {ALL}, got {name!r}")
        found += FIGURES if name == ALL else [int(name)]
    return list(dict.fromkeys(found))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    set_threads(arguments.threads)
    numbers = chosen(arguments.figures or ([ALL] if arguments.list else []))
    if arguments.list:
        print(listing(numbers, arguments.data, arguments.quick))
        return 0
    from .run import Job, run_figures

    data = arguments.data
    if data != DIGITS:
        data = str(Path(data).absolute())  # a checkpoint may be resumed from elsewhere
    job = Job(
        out=arguments.out,
        data=data,
        quick=arguments.quick,
        epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        device=arguments.device,
        overwrite=arguments.overwrite,
        draw_only=arguments.draw_only,
        progress=not arguments.no_progress,
    )
    try:
        run_figures(numbers, job, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def listing(numbers: list[int], data: str, quick: bool) -> str:
    """What figures show, with the scale of each run, as text."""
    lines = []
    for number in numbers:
        figure = FIGURES[number]
        lines += [f"{number}: {figure.shows}", f"    claim: {figure.claim}"]
        for panel in figure.panels:
            scale = scale_of(panel.model, data, quick)
            length = f"{1 if isinstance(panel, Spectrum) else scale.epochs} epochs"
            if scale.max_steps is not None:
                length += f", at most {scale.max_steps} steps"
            lines.append(f"    {panel.name:<28} batch {scale.batch_size}, {length}")
    return "\n".join(lines)
