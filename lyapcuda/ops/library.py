"""Where the compiled ops are looked up, and what every op that writes tells autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["compiled", "mark_written"]

#: The library of the ops. The tests put another backend's here.
namespace: Any = torch.ops.lyapcuda


def compiled(name: str) -> Callable[..., Any]:
    """The compiled op of that name, looked up at every call."""
    return getattr(namespace, name)


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd that the tensors were written in place, as torch's own ops do.

    A graph that saved one of them for its backward pass then refuses to run.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])
