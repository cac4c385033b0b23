"""Gradients in ``.grad`` that nobody asked to replace: told from those that a step itself left."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda.objective.evaluator import Closure
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.shards import local

__all__ = ["guarded", "note"]

#: By the parameter's id: the gradient that a step left there, and the version of what it held.
_left: dict[int, tuple[weakref.ref[Tensor], int]] = {}
# How many entries, before those of gradients that are gone are dropped.
_room = 1000


def note(parameters: Iterable[Tensor]) -> None:
    """What is in the parameters' ``.grad`` now was left by a step. Holds none in memory."""
    for p in parameters:
        gradient = p.grad
        if gradient is not None:
            _left[id(p)] = weakref.ref(gradient), local(gradient)._version
    global _room
    if len(_left) > _room:
        for i, (held, _) in list(_left.items()):
            if held() is None:
                _left.pop(i, None)
        _room = max(1000, 2 * len(_left))


def guarded(
    closure: Closure,
    parameters: Sequence[Tensor],
    ranks: Ranks | None = None,
    instead: str = "Pass micro-batches as step(closure, batches=...), or call",
) -> Closure:
    """The closure; where gradients are there that no step left, one whose first call raises unless
    the closure clears them.

    Values are read back only where such gradients are there.

    Args:
        closure: that is evaluated next, with the gradients cleared before.
        parameters: whose gradients it replaces.
        ranks: that share them.
        instead: in the error, what to do; or ``zero_grad()``.

    Example:
        >>> p = torch.tensor([1.0], requires_grad=True)
        >>> closure = lambda: p.square().sum()
        >>> closure().backward()
        >>> note([p])
        >>> guarded(closure, [p]) is closure
        True
        >>> closure().backward()  # added to what was left
        >>> guarded(closure, [p]) is closure
        False
    """
    added = [p for p in parameters if p.requires_grad and _is_added(p)]
    if not added:
        return closure
    counts = _nonzeros([p.grad for p in added], ranks)
    added = [p for p, count in zip(added, counts, strict=True) if count]
    return _FirstCall(closure, added, instead) if added else closure


def _is_added(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    held, version = _left.get(id(parameter), (None, 0))
    return held is None or held() is not gradient or local(gradient)._version != version


class _FirstCall:
    """A closure whose first call is handed copies of gradients, and raises where they stay.

    Args:
        closure: called with what this is called with.
        parameters: those with gradients.
        instead: as of `guarded`.
    """

    def __init__(self, closure: Closure, parameters: Sequence[Tensor], instead: str) -> None:
        self._closure, self._parameters, self._instead = closure, parameters, instead
        self.__wrapped__ = closure  # whose code this is
        self._gradients = [p.grad for p in parameters]
        self._done = False

    def __call__(self, *batch: Any) -> Tensor | float:
        if self._done:
            return self._closure(*batch)
        # Copies: what the user accumulated must be there, to the bit, after the error.
        watched = [
            _Watched(p, g.detach().clone())
            for p, g in zip(self._parameters, self._gradients, strict=True)
        ]
        try:
            loss = self._closure(*batch)
        finally:
            for each in watched:
                each.end()
        if not all([each.cleared for each in watched]):
            raise RuntimeError(
                "closure: gradients are in .grad already, which the step would drop: the curvature "
                "would be\n"
                f"of the closure's share alone. {self._instead}\n"
                "zero_grad() before it, or inside of the closure"
            )
        self._done = True
        return loss


class _Watched:
    """One parameter, whose ``.grad`` holds a copy: whether a closure clears that before it adds."""

    def __init__(self, parameter: Tensor, copy: Tensor) -> None:
        self._parameter, self._copy = parameter, copy
        self._version = local(copy)._version
        self.cleared = self._arrived = False
        parameter.grad = copy
        # Called with a gradient that is about to be added (or is asked for by autograd.grad).
        self._hook = parameter.register_hook(self._before_adding)

    def _before_adding(self, gradient: Tensor) -> None:
        self._look()
        self._arrived = True

    def _look(self) -> None:
        gradient = self._parameter.grad
        if gradient is None:
            self.cleared = True
        elif gradient is self._copy:
            changed = local(gradient)._version != self._version
            self.cleared = self.cleared or (changed and not _nonzeros([gradient])[0])
        elif not self._arrived:  # else it may be a sum (under create_graph, in DDP's bucket)
            self.cleared = True

    def end(self) -> None:
        """After the closure, which may have left backward() to others."""
        self._hook.remove()
        self._look()
        if self._parameter.grad is self._copy and not self._arrived:
            self._parameter.grad = None  # zeros that nothing was added to


def _nonzeros(gradients: Sequence[Tensor], ranks: Ranks | None = None) -> list[float]:
    """How many elements of each aren't zero, on all ranks together. Waits for the device."""
    held = [local(g).detach() for g in gradients]
    device = held[0].device
    counts = [
        g.count_nonzero().to(device, torch.float64)
        if g.layout == torch.strided
        else torch.ones((), dtype=torch.float64, device=device)  # refused elsewhere
        for g in held
    ]
    found = torch.stack(counts)
    return (found if ranks is None else ranks.sum(found)).tolist()
