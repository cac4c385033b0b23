"""The paper's experiments: ``python -m examples.paper train``, ``figures`` and ``eigs``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lyapcuda.command import program
from lyapcuda.command.problem import LOSSES
from lyapcuda.command.program import EXIT_DIVERGED, EXIT_INTERRUPTED, set_threads

from . import checkpoint, eigs
from .config import ESTIMATES, SCHEDULE_NAMES, TrainConfig, classes_argument, require_same
from .data import DIGITS
from .figures import command as figures
from .models import MODELS
from .train import TrainResult, saved_config, train

NAME = "examples.paper"
_CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status, as of :func:`lyapcuda.command.program.run`; 1 if training diverged or an
        eigenvalue did not converge.
    """
    return program.run(NAME, _parser, argv)


def _parser() -> program.Parser:
    parser = program.Parser(prog=f"python -m {NAME}", description="The paper's experiments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="run one of the paper's experiments"))
    figures.add_arguments(commands.add_parser("figures", help="run the figures of the paper"))
    eigs.add_arguments(commands.add_parser("eigs", help="eigenvalues of a model's Hessian"))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    default = TrainConfig()
    parser.description = "Train a model; writes run.csv, run.png and checkpoint.pt."
    # Every default is None: after --resume, what isn't given comes from the checkpoint.
    add = parser.add_argument
    add("--model", choices=MODELS, help=f"default {default.model}")
    add("--data", metavar="digits|DIR", help="digits (default) or a CIFAR-10 folder")
    add("--loss", choices=LOSSES, help=f"default {default.loss}")
    add("--schedule", choices=SCHEDULE_NAMES, help=f"default {default.schedule}")
    add("--lr", type=float, help=f"rate, or the cycle's peak (default {default.lr})")
    add("--gain", type=float, help=f"qn: lr = gain/h0 (default {default.gain})")
    add("--k", type=int, help="qn: how many curvatures, each along its own eigenvector (default 1)")
    add("--cycle-epochs", type=float, help=f"of a cycle (default {default.cycle_epochs:g})")
    add("--cycle-ratio", type=float, help=f"peak / lowest rate (default {default.cycle_ratio:g})")
    add("--warmup", type=int, metavar="N", help=f"qn: at most (default {default.warmup})")
    add("--epochs", type=int, help=f"default {default.epochs}")
    add("--max-steps", type=int, metavar="N", help="stop after N steps if that is earlier")
    add("--batch-size", type=int, metavar="N", help="default 128 for digits, 512 for CIFAR-10")
    add("--weight-decay", type=float, metavar="W", help=f"default {default.weight_decay}")
    add("--perturbation", type=float, metavar="Q", help="separation's length (default: automatic)")
    add("--estimate", choices=ESTIMATES, help="default growth with qn, else rayleigh")
    add("--every", type=int, metavar="N", help="measure on every N-th step (default 1)")
    add("--classes", type=classes_argument, metavar="A,B,...|all", help="default as in the paper")
    add("--augment", action=argparse.BooleanOptionalAction, help="default for CIFAR-10")
    add("--seed", type=int, help=f"default {default.seed}")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    add("--out", type=Path, metavar="DIR", help="default runs/MODEL-DATA-LOSS-SCHEDULE")
    add("--overwrite", action="store_true", help="replace another run in DIR")
    add("--checkpoint-every", type=int, default=1, metavar="EPOCHS", help="default 1")
    add("--resume", type=Path, metavar="PATH", help="go on from a checkpoint.pt")
    add("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    given = {
        name: getattr(arguments, name)
        for name in _CONFIG_FIELDS
        if getattr(arguments, name) is not None
    }
    if arguments.resume is not None:
        before = saved_config(arguments.resume, checkpoint.load(arguments.resume))
        # Here, not only in train: the mixture of two runs' arguments may be no configuration.
        require_same(arguments.resume, before, given)
        config = dataclasses.replace(before, **given)
        out = arguments.out or arguments.resume.parent
    else:
        config = TrainConfig(**given)
        data = DIGITS if config.data == DIGITS else "cifar10"
        name = f"{config.model}-{data}-{config.loss}-{config.schedule}"
        out = arguments.out or Path("runs") / name
    if config.data != DIGITS:
        # The checkpoint may be resumed from another working directory.
        config = dataclasses.replace(config, data=str(Path(config.data).absolute()))
    set_threads(arguments.threads)
    result = train(
        config,
        out,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
        progress=not arguments.no_progress,
        overwrite=arguments.overwrite,
    )
    return _report(result)


def _report(result: TrainResult) -> int:
    saved = result.checkpoint if result.checkpoint.exists() else "none written"
    for what, path in (("csv", result.csv), ("plot", result.png), ("checkpoint", saved)):
        print(f"{what + ':':<12}{path}")
    if result.diverged:
        print(
            f"the loss became {result.loss} at step {result.step}; try a smaller --lr or --gain",
            file=sys.stderr,
        )
        return EXIT_DIVERGED
    if result.interrupted:
        print(
            f"interrupted after step {result.step}; "
            f"go on with: python -m {NAME} train --resume {shlex.quote(str(result.checkpoint))}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    accuracy = "" if result.accuracy is None else f", test accuracy {result.accuracy:.2%}"
    print(
        f"step {result.step}: loss {result.loss:.4g}{accuracy}, "
        f"h0 {result.h:.4g} (an eigenvalue in [{result.h_low:.4g}, {result.h_high:.4g}]), "
        f"lr {result.lr:.4g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
