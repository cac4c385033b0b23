"""``lyapcuda eigs``: eigenvalues of the Hessian of a model and data of your own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lyapcuda.command import report
from lyapcuda.command.problem import Problem, from_names
from lyapcuda.command.program import EXIT_NOT_CONVERGED, set_threads, usable_device
from lyapcuda.solvers.eigsh import METHODS, WHICH
from lyapcuda.solvers.operator import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (
        "Eigenvalues of the Hessian of a model's loss over all of its data; prints a table, and "
        "with --out writes eigs.json and eigs.png."
    )
    add = parser.add_argument
    factory = "module:factory"
    add("--model", required=True, metavar=factory, help="a function that returns the module")
    add(
        "--data",
        required=True,
        metavar=factory,
        help="returns batches of (inputs, targets), or dicts",
    )
    add("--model-args", type=_options, metavar="JSON", help="of the first, as in '{\"width\": 64}'")
    add("--data-args", type=_options, metavar="JSON", help="of the second")
    add("--loss", default="ce", metavar="ce|mse|model|module:function", help="default ce")
    add("--sizes", metavar="sum|module:function", help="what a batch counts (default: see docs)")
    add_measurement(parser)
    parser.set_defaults(run=_run)


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what to measure of a problem, and where to show it."""
    add = parser.add_argument
    add("--weights", type=Path, metavar="PATH", help="a checkpoint: .pt, .ckpt, .safetensors")
    add("--weights-key", metavar="KEY", help="where in it the weights are, as in ema_model")
    add("--weight-decay", type=float, default=0.0, metavar="W", help="part of the loss (default 0)")
    add("-k", type=int, default=5, help="how many (default 5)")
    add("--which", default="LA", choices=WHICH, help="largest, smallest, ... (default LA)")
    add("--mode", default="auto", choices=MODES, help="exact products, differences (default auto)")
    add("--method", default="lanczos", choices=METHODS, help="default lanczos")
    add("--tol", type=float, default=1e-3, help="relative (default 1e-3)")
    add("--maxiter", type=int, metavar="N", help="products at most")
    add("--select", action="append", metavar="PATTERN", help="only parameters of such names")
    add("--exclude", action="append", metavar="PATTERN", help="not parameters of such names")
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


def _options(text: str) -> dict[str, Any]:
    """A JSON object, for argparse."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a JSON object, as in {{}}")
    return found


def _run(arguments: argparse.Namespace) -> int:
    def problem(device: str) -> Problem:
        return from_names(
            arguments.model,
            arguments.data,
            arguments.loss,
            weights=arguments.weights,
            weights_key=arguments.weights_key,
            weight_decay=arguments.weight_decay,
            device=device,
            sizes=arguments.sizes,
            model_options=arguments.model_args,
            data_options=arguments.data_args,
        )

    return measure(problem, arguments)


def measure(problem: Callable[[str], Problem], arguments: argparse.Namespace) -> int:
    """Measure a problem, made for a device, as :func:`add_measurement`'s arguments say.

    Returns:
        The exit status: 1 where an eigenvalue did not converge.
    """
    set_threads(arguments.threads)
    found = report.measure(
        problem(str(usable_device(arguments.device))),
        k=arguments.k,
        which=arguments.which,
        tol=arguments.tol,
        mode=arguments.mode,
        method=arguments.method,
        maxiter=arguments.maxiter,
        select=arguments.select,
        exclude=arguments.exclude,
        seed=arguments.seed,
        progress=_shows_progress(arguments),
        trace_samples=arguments.trace,
        density_steps=arguments.density,
    )
    if arguments.json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        print(found.table())
    if arguments.out is not None:
        for path in found.write(arguments.out):
            print(path, file=sys.stderr if arguments.json else sys.stdout)
    return 0 if bool(found.result.converged.all()) else EXIT_NOT_CONVERGED


def _shows_progress(arguments: argparse.Namespace) -> bool:
    """Whether someone is there to see it, and tqdm to draw it."""
    wanted = not (arguments.no_progress or arguments.json) and sys.stderr.isatty()
    return wanted and find_spec("tqdm") is not None
