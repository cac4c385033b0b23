"""The command line: ``lyapcuda train``, ``eigs``, ``paper`` and ``info``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from examples.paper import checkpoint
from examples.paper.config import ESTIMATES, LOSSES, SCHEDULE_NAMES, TrainConfig, require_same
from examples.paper.data import CLASSES, DIGITS
from examples.paper.models import MODELS
from examples.paper.figures import command as paper
from examples.paper.train import TrainResult, saved_config, train, usable_device
from lyapcuda.solvers.eigsh import METHODS, WHICH

EXIT_DIVERGED = EXIT_NOT_CONVERGED = 1
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141
_CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # so that every user error is one line, from one place


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status: 0, 1 if training diverged or an eigenvalue did not converge, 2 on a user's
        error, 130 after Ctrl-C, 141 where the reader of a pipe went away (``lyapcuda ... | head``).
    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return arguments.run(arguments)
        finally:
            print(end="", flush=True)  # here, where what goes wrong is still told in one line
    except BrokenPipeError:
        _give_up_output()
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, ImportError) as error:
        _give_up_output()
        message = " ".join(str(error).split())
        print(f"lyapcuda: error: {message}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("lyapcuda: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _give_up_output() -> None:
    """What standard output doesn't take any more, Python would try once more at its own end."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show_warning(message: Warning | str, *where: object) -> None:
    # Without Python's line of source, which tells a user nothing.
    print(f"lyapcuda: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lyapcuda", description="Curvature of a training run, while it runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="run one of the paper's experiments"))
    _add_eigs(commands.add_parser("eigs", help="eigenvalues of a model's Hessian"))
    _add_paper(commands.add_parser("paper", help="run the figures of the paper"))
    info = commands.add_parser("info", help="say how this installation was built")
    info.set_defaults(run=_info)
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
    add("--classes", type=_classes, metavar="A,B,...|all", help="default as in the paper")
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


def _classes(text: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(CLASSES))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers like 0,1 or all, got {text!r}"
        ) from None


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
    _set_threads(arguments.threads)
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
            f"lyapcuda: the loss became {result.loss} at step {result.step}; "
            "try a smaller --lr or --gain",
            file=sys.stderr,
        )
        return EXIT_DIVERGED
    if result.interrupted:
        print(
            f"interrupted after step {result.step}; "
            f"go on with: lyapcuda train --resume {shlex.quote(str(result.checkpoint))}",
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


def _add_eigs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Eigenvalues of the Hessian of a model's loss over all of its data; prints a table, and "
        "with --out writes eigs.json and eigs.png."
    )
    add = parser.add_argument
    add("--model", default="mlp", help=f"{', '.join(MODELS)} (default mlp), or module:factory")
    add("--data", default=DIGITS, metavar="digits|DIR|module:factory", help="default digits")
    add("--loss", default="ce", metavar="ce|mse|module:function", help="default ce")
    add("--weights", type=Path, metavar="PATH", help="a state_dict for the model")
    add(
        "--checkpoint", type=Path, metavar="PATH", help="all of these from a checkpoint.pt of train"
    )
    add("--samples", type=int, metavar="N", help="only the first N rows of digits or CIFAR-10")
    add("--classes", type=_classes, metavar="A,B,...|all", help="default as in the paper")
    add("--weight-decay", type=float, default=0.0, metavar="W", help="part of the loss (default 0)")
    add("-k", type=int, default=5, help="how many (default 5)")
    add("--which", default="LA", choices=WHICH, help="largest, smallest, ... (default LA)")
    add("--method", default="lanczos", choices=METHODS, help="default lanczos")
    add("--tol", type=float, default=1e-3, help="relative (default 1e-3)")
    add("--maxiter", type=int, metavar="N", help="products at most")
    add("--select", action="append", metavar="PATTERN", help="only parameters of such names")
    add("--trace", type=int, metavar="N", help="also the trace, from N products")
    add(
        "--density", type=int, metavar="N", help="also the spectral density, N Lanczos steps a draw"
    )
    add("--seed", type=int, default=0, help="default 0")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    add("--out", type=Path, metavar="DIR", help="for eigs.json and eigs.png")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=_eigs)


def _eigs(arguments: argparse.Namespace) -> int:
    from examples.paper import eigs, problem

    _set_threads(arguments.threads)
    device = str(usable_device(arguments.device))
    if arguments.samples is not None and arguments.samples < 1:
        raise ValueError(f"samples must be at least 1, got {arguments.samples}")
    if arguments.checkpoint is not None:
        found = problem.from_checkpoint(
            arguments.checkpoint, samples=arguments.samples, device=device
        )
    else:
        found = problem.from_names(
            arguments.model,
            arguments.data,
            arguments.loss,
            classes=arguments.classes,
            samples=arguments.samples,
            weights=arguments.weights,
            weight_decay=arguments.weight_decay,
            seed=arguments.seed,
            device=device,
        )
    report = eigs.measure(
        found,
        k=arguments.k,
        which=arguments.which,
        tol=arguments.tol,
        method=arguments.method,
        maxiter=arguments.maxiter,
        select=arguments.select,
        seed=arguments.seed,
        progress=not arguments.no_progress,
        trace_samples=arguments.trace,
        density_steps=arguments.density,
    )
    if arguments.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    else:
        print(report.table())
    if arguments.out is not None:
        for path in report.write(arguments.out):
            print(path, file=sys.stderr if arguments.json else sys.stdout)
    return 0 if bool(report.result.converged.all()) else EXIT_NOT_CONVERGED


def _add_paper(parser: argparse.ArgumentParser) -> None:
    paper.add_arguments(parser)
    parser.set_defaults(run=_paper)


def _paper(arguments: argparse.Namespace) -> int:
    _set_threads(arguments.threads)
    return paper.run(arguments)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _info(arguments: argparse.Namespace) -> int:
    from lyapcuda.extension import gpus_here
    from lyapcuda.ops.flat import build_info

    rows = {str(name): value for name, value in build_info().items()}
    rows |= {
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "gpu": gpus_here(),
        "python": platform.python_version(),
    }
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name + ':':<{width}}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
