"""Lightning's ``self.log`` inside a closure: heard once a step, at θ; or not at all.

What it logs is added up in the trainer's loops, in no module that could be put back, and drives
schedulers, early stopping and checkpoints.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lyapcuda.objective.pointing import at_a_copy

__all__ = ["log_at_theta_alone", "unheard"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_METHODS = ("log", "log_dict")


def log_at_theta_alone() -> None:
    """Has the ``log`` of Lightning's modules do nothing where `at_a_copy` is true, from now on.

    Does nothing where Lightning isn't imported.
    """
    for package in _PACKAGES:
        kind = getattr(sys.modules.get(package), "LightningModule", None)
        for name in _METHODS:
            method = getattr(kind, name, None)
            if method is not None and not hasattr(method, "_at_theta_alone"):
                setattr(kind, name, _at_theta(method))


def _at_theta(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def logged(self: Any, *args: Any, **kwargs: Any) -> None:
        if not at_a_copy():
            method(self, *args, **kwargs)

    logged._at_theta_alone = True  # type: ignore[attr-defined]
    return logged


@contextmanager
def unheard(module: Any) -> Iterator[None]:
    """A context in which the ``log`` of one of Lightning's modules does nothing."""
    own = {name: vars(module)[name] for name in _METHODS if name in vars(module)}
    vars(module).update(dict.fromkeys(_METHODS, _nothing))
    try:
        yield
    finally:
        for name in _METHODS:
            del vars(module)[name]
        vars(module).update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
