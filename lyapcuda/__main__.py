"""The command line: ``lyapcuda eigs``, ``plot`` and ``info``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence

import torch

import lyapcuda
from lyapcuda.command import eigs, plot, program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status, as of :func:`lyapcuda.command.program.run`; 1 if an eigenvalue did not
        converge.
    """
    return program.run("lyapcuda", _parser, argv)


def _parser() -> program.Parser:
    parser = program.Parser(
        prog="lyapcuda",
        description="Curvature of a neural network's loss, by gradients alone.",
        epilog="Exit status: 0 done; 1 an eigenvalue did not converge; 2 wrong usage or input, in "
        "one line on standard error; 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    eigs.add_arguments(commands.add_parser("eigs", help="eigenvalues of a model's Hessian"))
    plot.add_arguments(commands.add_parser("plot", help="the picture of a run, from its log"))
    info = commands.add_parser("info", help="say how this installation was built")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from lyapcuda.extension import gpus_here
    from lyapcuda.ops import build_info

    rows = {str(name): value for name, value in build_info().items()}
    rows |= {
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "gpu": gpus_here(),
        "python": platform.python_version(),
        "lyapcuda": lyapcuda.__version__,
    }
    if arguments.json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name + ':':<{width}}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
