"""What a program does alike for all of its commands: errors of one line, exit statuses, devices."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

EXIT_NOT_CONVERGED = EXIT_DIVERGED = 1
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, so that every user error is told in one place."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError."""
        raise ValueError(message)


def run(name: str, parser: Callable[[], Parser], argv: Sequence[str] | None) -> int:
    """Run a program whose commands have set ``run``, a function of the parsed arguments.

    Args:
        name: of the program, before its messages.
        parser: makes the parser.
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status: the command's, 2 on a user's error, 130 after Ctrl-C, 141 where the reader
        of a pipe went away (``lyapcuda ... | head``).
    """

    def show_warning(message: Warning | str, *where: object) -> None:
        # Without Python's line of source, which tells a user nothing.
        print(f"{name}: warning: {message}", file=sys.stderr)

    try:
        try:
            arguments = parser().parse_args(argv)
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                return arguments.run(arguments)
        finally:
            print(end="", flush=True)  # here, where what goes wrong is still told in one line
    except BrokenPipeError:
        _give_up_output()
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, ImportError) as error:
        _give_up_output()
        message = " ".join(str(error).split())
        print(f"{name}: error: {message}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _give_up_output() -> None:
    """What standard output doesn't take any more, Python would try once more at its own end."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def set_threads(threads: int | None) -> None:
    """Set how many threads torch uses on the CPU; None leaves it as it is.

    Raises:
        ValueError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def usable_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is cuda where there is one, else cpu.

    Raises:
        ValueError: it can't be used, naming it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device={name} can't be used: {reason}") from error
    return device
