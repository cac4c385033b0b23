"""The gradient of a user's closure at θ and at every θ + q, with everything else held equal.

All evaluations see the same random numbers and the same module buffers (dropout masks, BatchNorm
statistics), in the mode the user set. Gradients come from ``.backward()``, so checkpointing, hooks
and accumulation inside the closure work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lyapcuda.arguments import described
from lyapcuda.objective.interrupts import allowed
from lyapcuda.objective.isolation import Snapshot
from lyapcuda.objective.pointing import pointing
from lyapcuda.objective.same_function import ADVICE, Fingerprint
from lyapcuda.params.shards import locals_of, reset

__all__ = [
    "NO_GRADIENT",
    "Closure",
    "Evaluator",
    "Further",
    "Gradients",
    "Probe",
    "check_loss",
    "check_same",
    "lacks_any",
    "moved",
]

#: Takes nothing (where batches are streamed: a batch), returns the loss; may have called backward()
#: itself or leave that to us.
Closure = Callable[..., Tensor | float]


@dataclass(frozen=True)
class Gradients:
    """Gradients at θ and at each copy θ + q_j, None where there is none; the losses, detached."""

    g0: list[Tensor | None]
    copies: list[list[Tensor | None]]
    loss0: Tensor
    losses: list[Tensor]

    def of(self, first: int, count: int) -> Gradients:
        """Those of ``count`` copies from the ``first`` on."""
        span = slice(first, first + count)
        return Gradients(self.g0, self.copies[span], self.loss0, self.losses[span])


class Probe(Protocol):
    """Evaluates at further copies, once an evaluation at θ is done.

    Attributes:
        gradients: those of the last call, where its copy was; None where there is none.
    """

    gradients: list[Tensor | None]

    def gradient(self) -> list[Tensor | None]:
        """Returns the gradients at θ, which later evaluations don't overwrite."""

    def __call__(self, copy: Sequence[Tensor]) -> Tensor:
        """Returns the loss at ``copy``, which comes back holding the gradient there."""


#: Is handed what was found, and a way to evaluate at further copies.
Further = Callable[[Gradients, Probe], None]
#: What is said where a loss has nothing to do with the parameters.
NO_GRADIENT = (
    "closure: its loss gives none of the tracked parameters a gradient: were they replaced since, "
    "or do they belong to another model?"
)

_GRAD, _LAYOUT = operator.attrgetter("grad"), operator.attrgetter("layout")


def check_loss(loss: Any) -> None:
    if loss is None:
        raise TypeError("closure: it returned None: end it with `return loss`")
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"closure: expected it to return the loss, got {described(loss)}{_loss_within(loss)}"
        )
    if isinstance(loss, Tensor) and loss.is_complex():
        raise ValueError(f"closure: expected a real loss, got {loss.dtype}")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"closure: expected a loss of one element, got shape {tuple(loss.shape)}: return its "
            "mean() or sum()"
        )


def _loss_within(result: Any) -> str:
    """What to return of a model's output instead."""
    if isinstance(result, Mapping) and "loss" in result:
        return ": return its " + (".loss" if hasattr(result, "loss") else '["loss"]')
    if isinstance(getattr(result, "loss", None), Tensor):
        return ": return its .loss"
    if isinstance(result, Mapping | list | tuple):
        return ": return the loss alone, a tensor of one element"
    return ""


def lacks_any(gradients: Sequence[Tensor | None]) -> bool:
    """Whether one of them is None."""
    return any(map(operator.is_, gradients, repeat(None)))


def _appeared(parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
    """The parameters' gradients; None where none of them has one."""
    # map(), here and below: these passes over all tensors are a good part of what a step costs.
    found = list(map(_GRAD, parameters))
    return None if all(map(operator.is_, found, repeat(None))) else found


class Evaluator:
    """Evaluates closures at θ and beside it, over one set of parameters.

    Args:
        parameters: leaf tensors that require a gradient.
        names: the parameters' names, for messages.
        modules: whose buffers (and other parameters' gradients) are put back.

    Example:
        >>> p = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = Evaluator([p], ["p"]).gradients(lambda: p.square().sum(), [[torch.ones(2)]])
        >>> found.g0[0].tolist(), found.copies[0][0].tolist(), p.grad
        ([2.0, 4.0], [2.0, 2.0], None)
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Sequence[str], modules: Sequence[nn.Module] = ()
    ) -> None:
        self.parameters, self.names, self.modules = parameters, names, modules

    def snapshot(
        self, generators: Iterable[torch.Generator] = (), *, values: bool = False
    ) -> Snapshot:
        """What an evaluation may change besides its result, as it is now; ``values``: copies of the
        gradients with it.
        """
        return Snapshot(self.parameters, self.modules, generators, values=values)

    @contextmanager
    def pointing_to(self, copies: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the parameters hold ``copies``."""
        with pointing(self.parameters, self.modules) as hold:
            hold(copies)
            with allowed():
                yield

    def evaluate(self, closure: Closure) -> tuple[Tensor, list[Tensor | None]]:
        """Returns the detached loss and the gradients of one evaluation with cleared gradients.

        It leaves them in ``.grad``, and whatever else the closure changed.

        Raises:
            TypeError, ValueError: the closure returned no loss, none of the parameters got a
                gradient, or a gradient is sparse.
        """
        parameters = self.parameters
        for parameter in parameters:
            parameter.grad = None
        # Inside the user's autocast, cast weights are cached by tensor: they would be those of θ.
        torch.clear_autocast_cache()
        with torch.enable_grad(), allowed():
            loss = closure()
            check_loss(loss)
            found = _appeared(parameters)
            if found is None:
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise ValueError(
                        "closure: no parameter got a gradient, and the loss it returned can't be "
                        "differentiated: does it depend on the tracked parameters?"
                    )
                loss.backward()
                found = _appeared(parameters)
                if found is None:
                    raise ValueError(NO_GRADIENT)
        torch.clear_autocast_cache()
        gradients = locals_of(found)
        self._check_dense(gradients)
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        return value.reshape(()), gradients

    def _check_dense(self, gradients: Sequence[Tensor | None]) -> None:
        present = [g for g in gradients if g is not None] if lacks_any(gradients) else gradients
        if set(map(_LAYOUT, present)) != {torch.strided}:
            sparse = next(
                i for i, g in enumerate(gradients) if g is not None and g.layout != torch.strided
            )
            raise TypeError(
                f"closure: the gradient of {self.names[sparse]} has layout "
                f"{gradients[sparse].layout}; only dense (strided) gradients can be tracked "
                "(nn.Embedding: sparse=False)"
            )

    def gradients(
        self,
        closure: Closure,
        copies: Sequence[Sequence[Tensor]] = (),
        *,
        leave: bool = False,
        check: bool = False,
        further: Further | None = None,
    ) -> Gradients:
        """Evaluates the closure at every one of ``copies`` (θ + q_j), then at the parameters (θ).

        Args:
            closure: called once a copy and once more.
            copies: each θ + q_j, of the parameters' shapes, dtypes and devices (of DTensors, of
                this rank's part); come back holding the gradient there.
            leave: False puts everything back as it was, gradients and random states included. True
                leaves behind what one plain evaluation at θ leaves: its gradients in ``.grad``, the
                random states and buffers after it.
            check: evaluate once more at θ, and raise where the two differ. Waits for the device.
            further: called in the end; may evaluate at more copies, which leaves no trace either.

        Raises:
            TypeError, ValueError: as `evaluate`. After these, as after any exception of the
                closure's own, everything is as it was.
            RuntimeError: ``check`` found the closure to be another function each time.
        """
        before = self.snapshot()
        found, losses = [], []
        try:
            # θ last: that evaluation leaves what training expects.
            with pointing(self.parameters, self.modules) if copies else nullcontext() as hold:
                for copy in copies:
                    hold(copy)
                    loss, there = self.evaluate(closure)
                    # θ + q is no longer needed, so its gradient takes its place. By reference it
                    # wouldn't be safe: storage may be used again (DDP's buckets, a closure that
                    # writes .grad), and memory would hold one gradient more for every copy.
                    found.append(moved(there, copy))
                    del there
                    losses.append(loss)
                    before.restore()
            if check:  # the last two of all, so that a closure that alternates is found too
                once = Fingerprint.of(*self.evaluate(closure))
                before.restore()
            loss0, g0 = self.evaluate(closure)
            if check:
                check_same(once, Fingerprint.of(loss0, g0))
            result = Gradients(g0, found, loss0, losses)
            if further is not None:
                probe = _Probe(self, closure, before)
                further(result, probe)
                probe.end()
        except BaseException:
            reset(self.modules)
            before.restore()
            before.restore_gradients()
            raise
        if not leave:
            before.restore()
            before.restore_gradients()
        return result


class _Probe:
    """Evaluates a closure at further copies after it was evaluated at θ.

    What that evaluation has left (gradients, random states, buffers) is put back by `end`, bitwise.
    Memory: a copy of the gradients, from the first call on.

    Args:
        evaluator, closure: whose gradients.
        before: the states that every evaluation starts from.

    Attributes:
        gradients: those of the last call, where its copy was.
    """

    def __init__(self, evaluator: Evaluator, closure: Closure, before: Snapshot) -> None:
        self._evaluator, self._closure, self._before = evaluator, closure, before
        self._after: Snapshot | None = None
        self.gradients: list[Tensor | None] = []

    def gradient(self) -> list[Tensor | None]:
        """The gradients at θ, which later evaluations don't overwrite."""
        if self._after is None:
            self._after = self._evaluator.snapshot(values=True)
        return locals_of(self._after.gradients)

    def __call__(self, copy: Sequence[Tensor]) -> Tensor:
        """Returns the loss at ``copy``, which comes back holding the gradient there."""
        self.gradient()
        self._before.restore()
        with pointing(self._evaluator.parameters, self._evaluator.modules) as hold:
            hold(copy)
            loss, there = self._evaluator.evaluate(self._closure)
            self.gradients = moved(there, copy)
        return loss

    def end(self) -> None:
        """Puts back what the evaluation at θ has left."""
        if self._after is not None:
            self._after.restore()
            self._after.restore_gradients()


def check_same(once: Fingerprint, again: Fingerprint) -> None:
    """Raises a RuntimeError where two evaluations at the same θ differ by more than rounding."""
    difference = once.differs(again)
    if difference is not None:
        raise RuntimeError(
            f"closure: two evaluations at the same θ gave {difference}; expected the same loss and "
            f"gradient every time: {ADVICE}"
        )


@torch.no_grad()
def moved(gradients: Sequence[Tensor | None], to: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in the memory of other tensors like them, as far as there are any."""
    if not lacks_any(gradients):
        torch._foreach_copy_(to, gradients)  # as torch.optim does
        return list(to)
    moved = [None if g is None else c for c, g in zip(to, gradients, strict=True)]
    there, held = ([t for t in some if t is not None] for some in (moved, gradients))
    if there:
        torch._foreach_copy_(there, held)
    return moved
