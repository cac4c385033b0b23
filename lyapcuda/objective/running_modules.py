"""Modules that run in an evaluation, seen as they run: what they hold is kept before it changes.

Without this, what isn't in one tree with a tracked parameter would stay hidden (an encoder, the
other network of a GAN).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from lyapcuda.objective.isolation import LooseBuffers, Snapshot

__all__ = ["RunningModules", "is_compiled"]


class RunningModules:
    """A context in which modules that run in this thread are noticed.

    Args:
        modules: those that are known.
        before: takes on the others, with their children, and tensors in the place of buffers.
        found: called with those that are new.
        compiled: the closure calls functions of torch.compile's: as if a module were compiled.

    Attributes:
        known: all of them, by id; ``new``: those that weren't at first.
        foreign: tensors that ``functional_call`` has put in the place of buffers, by id.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        before: Snapshot,
        found: Callable[[list[nn.Module]], None] | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.known = {id(m): m for m in modules}
        self.new: list[nn.Module] = []
        self.foreign: dict[int, Tensor] = {}
        self._before, self._found, self.compiled = before, found, compiled
        self._thread = threading.get_ident()
        self._own = {id(m): _ids(m) for m in modules if m._buffers}
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> RunningModules:
        # A hook of all modules would have compiled ones compiled again.
        self.compiled = self.compiled or any(map(is_compiled, self.known.values()))
        if not self.compiled:
            self._handle = register_module_forward_pre_hook(self._runs)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._found = None  # who is told holds this: what was kept would outlive the evaluation

    def add(self, module: nn.Module) -> None:
        """Notices a module and its children."""
        new = [m for m in module.modules() if id(m) not in self.known]
        if not new:
            return
        self._before.notice_modules(new)
        self.known.update((id(m), m) for m in new)
        self.new += new
        self._own.update((id(m), _ids(m)) for m in new if m._buffers)
        if self._found is not None:
            self._found(new)

    def _runs(self, module: nn.Module, _: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        # Within torch.func's functions tensors stand for others, and can't be kept as they are.
        inside = torch._C._functorch.peek_interpreter_stack() is not None
        with temporarily_clear_interpreter_stack() if inside else nullcontext():
            self._notice(module)

    def _notice(self, module: nn.Module) -> None:
        if id(module) not in self.known and not _is_swapped():
            self.add(module)
        if module._buffers:
            own = self._own.get(id(module), ())
            held = (_innermost(b) for b in module._buffers.values() if b is not None)
            there = {id(b): b for b in held}
            new = {i: b for i, b in there.items() if i not in own and i not in self.foreign}
            if new:
                self._before.notice_modules([LooseBuffers(new.values())])
                self.foreign.update(new)


def _is_swapped() -> bool:
    """Whether this is within ``functional_call``, where modules hold tensors not their own."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_functional_call" and code.co_filename.endswith("stateless.py"):
            return True
        frame = frame.f_back
    return False


def _innermost(tensor: Tensor) -> Tensor:
    """The tensor that one within torch.func's functions stands for."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _ids(module: nn.Module) -> set[int]:
    return {id(b) for b in module._buffers.values()}


def is_compiled(function: Any) -> bool:
    """Whether a module or function is torch.compile's."""
    if isinstance(function, nn.Module):
        compiled = function.__dict__.get("_compiled_call_impl") is not None
        return compiled or type(function).__name__ == "OptimizedModule"
    return hasattr(function, "_torchdynamo_orig_callable")
