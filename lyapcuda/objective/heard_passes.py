"""What an evaluator hears of a closure's backward passes, and the marks by which it sees whether
gradients that were there are cleared first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from lyapcuda.objective.backward_passes import Outermost, listening
from lyapcuda.objective.isolation import Snapshot, TrackedGradients
from lyapcuda.objective.loss_graph import leaves_of

__all__ = ["HeardPasses", "Marks"]

_GRAD = operator.attrgetter("grad")
#: How many gradients stand in for all of them.
_MARKS = 8


class HeardPasses(Outermost):
    """Hears the backward passes of one evaluation.

    Args:
        parameters, tracked: the tracked ones, and their ids.
        keep: copy the gradients after each pass, before the closure changes them.
        before: takes on the leaves that are found.
        marks: are read before the first pass.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        tracked: set[int] = frozenset(),
        keep: bool = False,
        before: Snapshot | None = None,
        marks: Marks | None = None,
    ) -> None:
        super().__init__()
        self._parameters, self._tracked, self._keep = parameters, tracked, keep
        self._before, self._marks = before, marks
        self.needed = keep or before is not None or marks is not None
        self.count, self.root = 0, None
        self.kept: list[Tensor | None] | None = None

    def listening(self) -> AbstractContextManager[None]:
        """A context in which it listens, where there is anything to hear."""
        return listening(self) if self.needed else nullcontext()

    def begins(self, roots: Sequence[Any]) -> None:
        self.root = roots[0] if len(roots) == 1 else None
        if self._marks is not None:
            self._marks.read()
        if self._before is not None:
            for root in roots:
                for leaf in leaves_of(root):
                    if id(leaf) not in self._tracked:
                        self._before.notice(leaf)

    def ended(self) -> None:
        self.count += 1
        if self._keep:
            self.kept = [
                None if g is None else g.detach().clone() for g in map(_GRAD, self._parameters)
            ]


class Marks:
    """Stand-ins for gradients that are there, to see whether a closure clears them first.

    A few small ones: they cost nothing, and whether they are still there tells for all.

    Args:
        parameters: the tracked ones.
        kept: their gradients; takes on what was told.
    """

    def __init__(self, parameters: Sequence[Tensor], kept: TrackedGradients) -> None:
        pairs = zip(parameters, kept.gradients, strict=True)
        there = sorted(
            ((p, g) for p, g in pairs if g is not None), key=lambda pair: pair[0].numel()
        )
        self._kept, self._some = kept, there[:_MARKS]
        self._set: list[tuple[Tensor, Tensor, int]] = []
        self.told = False

    def set(self) -> None:
        """Puts them in place."""
        for parameter, gradient in self._some:
            mark = gradient.detach().clone()
            parameter.grad = mark
            self._set.append((parameter, mark, mark._version))

    def around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, which leaves ``backward()`` to us, with them set and read."""

        def marked() -> Any:
            self.set()
            loss = closure()
            self.read()
            return loss

        return marked

    def read(self) -> None:
        """Before the first backward pass: sees which are still there, and takes them away."""
        if self.told:
            return
        self.told = True
        left = [p.grad is mark and mark._version == v for p, mark, v in self._set]
        for parameter, mark, _ in self._set:
            if parameter.grad is mark:
                parameter.grad = None
        self._kept.cleared = True if not any(left) else False if not all(left) else None
