"""Where a user's program enters the package: outside of torch.compile's tracing, with autograd."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["entry_point", "untraced"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def untraced(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Has a function run as it is where torch.compile traces its caller.

    As torch.compiler.disable does, which imports torch._dynamo, for a second or two: until somebody
    else has imported that, nothing is traced, and nothing is done about it.
    """
    disabled: Callable[_Arguments, _Result] | None = None

    @functools.wraps(function)
    def enter(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return enter


def entry_point(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`untraced`, and a RuntimeError inside of torch.inference_mode, before anything changes."""

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{function.__qualname__} was called inside of torch.inference_mode, which has no "
                "gradients: call it\noutside (Lightning: Trainer(inference_mode=False)), or inside "
                "of torch.inference_mode(False)"
            )
        return function(*args, **kwargs)

    return untraced(checked)
