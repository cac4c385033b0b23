"""Where the compiled ops are looked up; what they tell autograd and tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lyapcuda import _C

__all__ = ["build_info", "compiled", "fake", "mark_written", "register_fakes"]

#: The library of the ops. The tests put another backend's here.
namespace: Any = torch.ops.lyapcuda

#: What each op returns, by shapes alone.
_FAKES: dict[str, Callable[..., Any]] = {}


def build_info() -> dict[str, object]:
    """How the extension was built and which instruction set it runs with."""
    return {**_C.build_info(), "threads": torch.get_num_threads()}


def compiled(name: str) -> Callable[..., Any]:
    """The compiled op of that name, looked up at every call."""
    return getattr(namespace, name)


def mark_written(*tensors: Tensor | None) -> None:
    """Tells autograd that the tensors were written in place, as torch's own ops do.

    A graph that saved one of them for its backward pass then refuses to run.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def fake(name: str, function: Callable[..., Any]) -> None:
    """Declares what an op returns, for tracing. An op that returns nothing needs no declaration.

    Args:
        name: of the op.
        function: takes the op's arguments; returns an empty tensor of the right shape and dtype.
    """
    _FAKES[name] = function


def register_fakes(namespace: str) -> None:
    """Registers the fake of every op that ``torch.ops.<namespace>`` has."""
    for qualified in torch._C._dispatch_get_all_op_names():
        library, _, name = qualified.partition("::")
        if library != namespace or "." in name:
            continue
        returns = getattr(getattr(torch.ops, library), name).default._schema.returns
        torch.library.register_fake(qualified, _FAKES[name] if returns else _nothing)


def _nothing(*args: Any, **options: Any) -> None:
    return None
