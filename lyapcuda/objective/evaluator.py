"""The gradient of a user's closure at θ and at every θ + q, with everything else held equal.

All evaluations see the same random numbers and the same module buffers (dropout masks, BatchNorm
statistics), in the mode the user set. Gradients come from ``.backward()``, so checkpointing, hooks
and accumulation inside the closure work.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lyapcuda.arguments import described
from lyapcuda.objective.backward_passes import listening
from lyapcuda.objective.first_evaluation import PRECOMPUTED, FirstEvaluation, Manner, Touched
from lyapcuda.objective.heard_passes import HeardPasses, Marks
from lyapcuda.objective.interrupts import allowed
from lyapcuda.objective.isolation import LooseBuffers, ParameterValues, Snapshot, TrackedGradients
from lyapcuda.objective.lightning_logs import log_at_theta_alone
from lyapcuda.objective.loss_multiple import Multiple, is_multiple
from lyapcuda.objective.own_gradient import check_own_gradient
from lyapcuda.objective.pointing import aside, pointing
from lyapcuda.objective.reachable import code_of
from lyapcuda.objective.running_modules import RunningModules
from lyapcuda.objective.same_function import ADVICE, Fingerprint
from lyapcuda.params.ranks import is_wrapper
from lyapcuda.params.shards import any_sharded, locals_of, reset

__all__ = [
    "NO_GRADIENT",
    "OWN",
    "Add",
    "Closure",
    "Evaluator",
    "Further",
    "Gradients",
    "NoGradient",
    "Probe",
    "check_loss",
    "check_same",
    "copied",
    "lacks_any",
    "moved",
]

#: Takes nothing (where batches are streamed: a batch), returns the loss; may have called backward()
#: itself or leave that to us.
Closure = Callable[..., Tensor | float]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Gradients:
    """Gradients at θ and at each copy θ + q_j, None where there is none; the losses, detached.

    ``leave`` puts what is to be left into ``.grad``, once ``g0`` isn't needed any more.
    """

    g0: list[Tensor | None]
    copies: list[list[Tensor | None]]
    loss0: Tensor
    losses: list[Tensor]
    leave: Callable[[], object] = _nothing

    def of(self, first: int, count: int) -> Gradients:
        """Those of ``count`` copies from the ``first`` on."""
        span = slice(first, first + count)
        return Gradients(self.g0, self.copies[span], self.loss0, self.losses[span])


class NoGradient(ValueError):
    """A closure gives no tracked parameter a gradient."""


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


class Scaling(Protocol):
    """A factor in the gradients of a measurement (a GradScaler's).

    Attributes:
        in_results: whether results are divided by it; the check of the gradient always is.
        gives_way: to the factor that a closure's backward pass was seen to have.
    """

    in_results: bool
    gives_way: bool

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss times it."""

    def take(self) -> None:
        """Called after each evaluation."""

    def divide_(self, gradients: Sequence[Tensor | None]) -> None:
        """Divides by it in place."""


#: Is handed what was found, and a way to evaluate at further copies.
Further = Callable[[Gradients, Probe], None]
#: Of `Evaluator.gradients`: whether gradients that are there are added to.
Add = bool | Literal["own"]
OWN: Literal["own"] = "own"
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
        by_hand: closures average gradients over ranks themselves, after their backward pass.

    Example:
        >>> p = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = Evaluator([p], ["p"]).gradients(lambda: p.square().sum(), [[torch.ones(2)]])
        >>> found.g0[0].tolist(), found.copies[0][0].tolist(), p.grad
        ([2.0, 4.0], [2.0, 2.0], None)
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        modules: Sequence[nn.Module] = (),
        *,
        by_hand: bool = False,
    ) -> None:
        self.parameters, self.names, self._given = parameters, names, list(modules)
        self._by_hand = by_hand
        #: Whether gradients are averaged over ranks as they come.
        self.averages = by_hand or any_sharded(parameters) or any(map(is_wrapper, modules))
        #: What closures were seen to touch, and how each goes about it, by its code.
        self.touched = Touched()
        self.manners: dict[Hashable, Manner] = {}
        self._counts: dict[Hashable, int] = {}
        self._tracked = {id(p) for p in parameters}
        self._last: weakref.ref[Tensor] | None = None
        self._called_backward = self._returned_share = False
        #: Of the gradients that closures' backward passes give, for the present measurement.
        self.scaling: Scaling | None = None
        self._share = Multiple()
        #: How many times the curvature measured that of the closure is to be.
        self.times = 1.0
        log_at_theta_alone()

    @property
    def modules(self) -> list[nn.Module]:
        """Those whose buffers, and whose other parameters' gradients, are put back."""
        others, foreign = list(self.touched.modules), list(self.touched.foreign)
        if not others and not foreign:
            return self._given
        known = {id(m) for m in self._given}
        others = [m for m in others if id(m) not in known]
        return [*self._given, *others, *([LooseBuffers(foreign)] if foreign else ())]

    def snapshot(
        self,
        generators: Iterable[torch.Generator] = (),
        *,
        values: bool = False,
        written: bool = False,
        leaves: Sequence[Tensor] = (),
    ) -> Snapshot:
        """What an evaluation may change besides its result, as it is now.

        Args:
            generators: of the user's own.
            values: copies of the gradients with it.
            written: a closure may write to the parameters: where they lie, and copies of few. Where
                one was seen to, copies of all are taken anyway.
            leaves: tensors whose gradients are kept, beside those that are known.
        """
        known = any(manner.writes_parameters for manner in self.manners.values())
        return Snapshot(
            self.parameters,
            self.modules,
            generators,
            values=values,
            leaves=[*self.touched.leaves, *leaves],
            places=self.touched.places,
            written=[*(self.parameters if known else ()), *self.touched.written],
            looked_at=self.parameters if written and not known else (),
        )

    @contextmanager
    def pointing_to(self, copies: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the parameters hold ``copies``."""
        with pointing(self.parameters, self.modules) as hold:
            hold(copies)
            with allowed():
                yield

    def knows(self, closure: Closure) -> bool:
        """Whether a closure of this text was evaluated before."""
        return code_of(closure) in self.manners

    def manner(self, closure: Closure) -> Manner:
        """How closures of this text go about their evaluation, as far as that is known."""
        return self.manners.get(code_of(closure), Manner())

    @contextmanager
    def looking(
        self, closure: Closure, before: Snapshot, again: bool = False, values: bool = True
    ) -> Iterator[FirstEvaluation | None]:
        """Inside, the one evaluation of a closure that isn't known yet is watched for what it
        touches, which ``before`` then puts back too. So are the second, fourth, eighth and so on:
        a closure may do something new. Gives what watches, where something does.

        Args:
            again: also if it is known.
            values: look at the parameters' values too, which waits for the device.

        Raises:
            RuntimeError: as `FirstEvaluation`.
        """
        code = code_of(closure)
        count = self._counts[code] = self._counts.get(code, 0) + 1
        if code in self.manners and not again and count & (count - 1):
            with RunningModules(self.modules, before, compiled=self.touched.compiled):
                yield None
            return
        parts = (self.parameters, self.modules, before, self.touched)
        values = values and (again or code not in self.manners)
        with FirstEvaluation(closure, *parts, values=values) as seen:
            yield seen
        self.manners[code] = replace(
            seen.manner,
            calls_backward=self._called_backward,
            changes_gradients=seen.manner.changes_gradients and not self._by_hand,
            returns_share=self._returned_share,
        )

    def evaluate(
        self,
        closure: Closure,
        before: Snapshot | None = None,
        marks: Marks | None = None,
        *,
        of: Closure | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Returns the detached loss and the gradients of one evaluation with cleared gradients.

        It leaves them in ``.grad``, and whatever else the closure changed. Where the closure was
        seen to change ``.grad`` after its backward pass, the gradients are as that pass left them.

        Args:
            before: takes on the leaves that it finds in the graph.
            marks: gradients that stand in for those that were there.
            of: the user's closure, where that is another one.

        Raises:
            TypeError, ValueError: the closure returned no loss, none of the parameters got a
                gradient, or a gradient is sparse.
            RuntimeError: its loss was computed before.
        """
        parameters = self.parameters
        for parameter in parameters:
            parameter.grad = None
        # Inside the user's autocast, cast weights are cached by tensor: they would be those of θ.
        torch.clear_autocast_cache()
        seen = self.manners.get(code_of(closure if of is None else of))
        manner = Manner() if seen is None else seen
        changes = manner.changes_gradients
        heard = HeardPasses(self.parameters, self._tracked, changes, before, marks)
        heard.needed |= seen is None or manner.returns_share
        with torch.enable_grad(), heard.listening(), _named_errors(), allowed():
            if marks is not None:
                marks.set()
            loss = closure()
            check_loss(loss)
            self._check_new(loss)
            if marks is not None:
                marks.read()
            found = _appeared(parameters)
            self._called_backward = found is not None
            share = manner.returns_share
            if seen is None:
                share = heard.count == 1 and is_multiple(heard.root, loss)
            self._returned_share = share
            if found is None:
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise NoGradient(
                        "closure: no parameter got a gradient, and the loss it returned can't be "
                        "differentiated: does it depend on the tracked parameters?"
                    )
                (loss if self.scaling is None else self.scaling.scaled(loss)).backward()
                found = _appeared(parameters)
                if found is None:
                    raise NoGradient(NO_GRADIENT)
            self._share.take(heard.root if share else None, loss)
            if self.scaling is not None:
                self.scaling.take()
        torch.clear_autocast_cache()
        gradients = locals_of(found if heard.kept is None else heard.kept)
        self._check_dense(gradients)
        return _detached(loss), gradients

    def _check_new(self, loss: Tensor | float) -> None:
        """Raises where the last call returned this very tensor."""
        if isinstance(loss, Tensor):
            if self._last is not None and self._last() is loss and loss.grad_fn is not None:
                raise RuntimeError(PRECOMPUTED)
            self._last = weakref.ref(loss)

    def survey(self, closure: Closure, batch: Any) -> None:
        """Evaluates a closure of a batch only to see what it touches; leaves no trace."""
        before = self.snapshot(written=True)
        try:
            with aside(), self.looking(closure, before):
                self.evaluate(partial(closure, batch), before)
        except BaseException:
            reset(self.modules)
            raise
        finally:
            before.restore()
            before.restore_gradients()

    def loss(self, closure: Closure, graph: bool = True) -> Tensor:
        """Returns the loss as it is now, detached, without a backward pass of ours. Gradients are
        cleared before: with autograd's ``graph`` the closure may take its own.
        """
        for parameter in self.parameters:
            parameter.grad = None
        with torch.set_grad_enabled(graph), allowed():
            loss = closure()
        check_loss(loss)
        return _detached(loss, torch.float64)

    def run(self, closure: Closure, add: Add = True) -> Tensor:
        """Evaluates a closure as training would: its gradient is added to what is there, unless it
        clears that itself.

        Args:
            add: as of `gradients`.

        Returns:
            The loss, detached. After an exception everything is as it was, for a copy of the
            gradients.
        """
        before = self.snapshot(values=True)
        there = [(p.grad, None if p.grad is None else p.grad._version) for p in self.parameters]
        heard = HeardPasses(self.parameters, self._tracked)
        try:
            with torch.enable_grad(), listening(heard), _named_errors(), allowed():
                torch.clear_autocast_cache()
                loss = closure()
                check_loss(loss)
                pairs = zip(there, self.parameters, strict=True)
                untouched = all(
                    p.grad is g and (g is None or g._version == v) for (g, v), p in pairs
                )
                # (DDP's forward pass may move gradients to other buckets.)
                ours = not heard.count and (untouched or self.averages)
                if ours and isinstance(loss, Tensor):
                    for parameter in self.parameters if add is OWN else ():
                        parameter.grad = None
                    (loss if self.scaling is None else self.scaling.scaled(loss)).backward()
                torch.clear_autocast_cache()
        except BaseException:
            self._undo(before)
            raise
        return _detached(loss)

    def _undo(self, before: Snapshot) -> None:
        """Puts everything back after an exception."""
        reset(self.modules)
        before.restore()
        before.restore_gradients()

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
        add: Add = False,
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
            add: with ``leave``, gradients that were there before are added to, unless the closure
                clears them, bit for bit; it is so once the result's ``leave()`` was called. Where
                the closure calls ``backward()`` itself and doesn't clear them first, that takes one
                evaluation more. `OWN`: only by a closure that calls ``backward()`` itself; where it
                leaves that to us, they are replaced.
            check: evaluate once more at θ, and raise where the two differ; and see whether the loss
                changes along its gradient as that says. Waits for the device.
            further: called in the end; may evaluate at more copies, which leaves no trace either.

        Gradients that come scaled (`scaling`) are without that in the result, in ``.grad`` with it.

        Raises:
            TypeError, ValueError: as `evaluate`. After these, as after any exception of the
                closure's own, everything is as it was.
            RuntimeError: ``check`` found the closure to be another function each time, or its
                gradient not to be that of its loss; or as `FirstEvaluation`.
        """
        if add and not copies:
            return Gradients([], [], self.run(closure, add), [])
        before = self.snapshot(written=not copies and not self.knows(closure))
        kept = TrackedGradients(self.parameters, self.modules) if add and leave else None
        kept = kept if kept is not None and kept.any else None
        # (DDP's forward pass moves what is in .grad, marks too.)
        marks = None if kept is None or self.averages else Marks(self.parameters, kept)
        found, losses, changes = [], [], self.manner(closure).changes_gradients
        try:
            # θ last: that evaluation leaves what training expects.
            with pointing(self.parameters, self.modules) if copies else nullcontext() as hold:
                for copy in copies:
                    hold(copy)
                    first = not found  # it shows what the others touch
                    with self.looking(closure, before, check, check) if first else nullcontext():
                        loss, there = self.evaluate(closure, before if first else None, marks)
                    if first and self.manner(closure).changes_gradients and not changes:
                        before.restore()  # it has changed these already
                        loss, there = self.evaluate(closure)
                    marks = None if marks is None or marks.told else marks
                    # θ + q is no longer needed, so its gradient takes its place. By reference it
                    # wouldn't be safe: storage may be used again (DDP's buckets, a closure that
                    # writes .grad), and memory would hold one gradient more for every copy.
                    found.append(moved(there, copy))
                    del there
                    losses.append(loss)
                    before.restore()
            if self.manner(closure).writes_parameters:
                before.notice_values(ParameterValues(self.parameters))
            once = self._checked(closure, before) if check else None
            if kept is not None and add is OWN and not self.manner(closure).calls_backward:
                kept.cleared = True  # ours, so as if it had
            apart = kept is not None and self._is_apart(closure, kept)
            first = not copies
            look = self.looking(closure, before, check, check) if first else nullcontext()
            with aside() if apart else nullcontext(), look:
                loss0, g0 = self.evaluate(closure, before if first else None)
            if first and further and self.manner(closure).changes_gradients and not changes:
                before.restore()  # it has changed these already
                loss0, g0 = self.evaluate(closure)
            if once is not None:
                check_same(once, Fingerprint.of(loss0, g0), self.manner(closure).epsilon)
            if self.is_scaled:
                for copy in found:
                    self.scale_(copy)
                g0 = copied(g0)
                self.scale_(g0)
            elif apart:
                g0 = copied(g0)
            result = Gradients(g0, found, loss0, losses)
            if further is not None:
                probe = _Probe(self, closure, before, g0)
                further(result, probe)
                probe.end()
        except BaseException:
            self._undo(before)
            raise
        if not leave or apart:
            before.restore()
            before.restore_gradients()
        if apart:
            return replace(result, leave=partial(self.run, closure))
        if kept is not None and not kept.cleared:
            return replace(result, leave=kept.accumulate)
        return result

    def _is_apart(self, closure: Closure, kept: TrackedGradients) -> bool:
        """Whether training's own evaluation has to be one of its own, on the gradients that were
        there: adding to them in the end wouldn't be the same.
        """
        if kept.cleared:
            return False
        if kept.cleared is None and not self.manner(closure).calls_backward:
            return self.averages or any(p._post_accumulate_grad_hooks for p in self.parameters)
        return True

    @property
    def _divisor(self) -> Multiple | Scaling | None:
        """What results are divided by."""
        scaling = self.scaling
        if self._returned_share and (scaling is None or scaling.gives_way):
            return self._share
        return scaling if scaling is not None and scaling.in_results else None

    @property
    def is_scaled(self) -> bool:
        """Whether results aren't the gradients as the closure's backward pass gives them."""
        return self.times != 1.0 or self._divisor is not None

    def scale_(self, gradients: Sequence[Tensor | None]) -> None:
        """Makes results of gradients, in place."""
        divisor = self._divisor
        if divisor is not None:
            divisor.divide_(gradients)
        if self.times != 1.0:
            torch._foreach_mul_([g for g in gradients if g is not None], self.times)

    def _checked(self, closure: Closure, before: Snapshot) -> Fingerprint:
        """Evaluates at θ for a check alone, and returns what the next evaluation has to agree with.

        Raises:
            RuntimeError: the loss doesn't change along its gradient as that says (left out where
                ranks average gradients: the loss is one rank's own), or is another each time.
        """
        with aside():
            loss, gradients = self.evaluate(closure)
            complaint: RuntimeError | None = None
            if not self.averages:
                scaling = self._share if self._returned_share else self.scaling
                if scaling is not None:
                    gradients = copied(gradients)
                    scaling.divide_(gradients)

                def loss_at(copies: Sequence[Tensor]) -> float:
                    before.restore()
                    with self.pointing_to(copies):
                        return float(self.loss(closure))

                try:
                    check_own_gradient(
                        loss_at,
                        float(loss),
                        self.parameters,
                        gradients,
                        self.manner(closure).epsilon,
                    )
                except RuntimeError as error:
                    complaint = error
                before.restore()
                told = [held.now() for held in self.touched.floats]
                loss, gradients = self.evaluate(closure)
                pairs = zip(self.touched.floats, told, strict=True)
                # At one θ a value that is only replaced stays the same.
                self.touched.warn(held.name for held, value in pairs if held.now() != value)
            # Of two in a row, so that a closure that alternates is found too.
            once = Fingerprint.of(loss, gradients)
            if complaint is not None:  # another function each time explains it better
                before.restore()
                check_same(once, Fingerprint.of(*self.evaluate(closure)))
                raise complaint
        before.restore()
        return once


@contextmanager
def _named_errors() -> Iterator[None]:
    """Says what is wrong where autograd only says that a graph was used before."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(PRECOMPUTED) from error
        raise


class _Probe:
    """Evaluates a closure at further copies after it was evaluated at θ.

    What that evaluation has left (gradients, random states, buffers) is put back by `end`, bitwise.
    Memory: a copy of the gradients, from the first call on.

    Args:
        evaluator, closure: whose gradients.
        before: the states that every evaluation starts from.
        g0: the gradients at θ, without a scaling.

    Attributes:
        gradients: those of the last call, where its copy was.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        closure: Closure,
        before: Snapshot,
        g0: Sequence[Tensor | None] = (),
    ) -> None:
        self._evaluator, self._closure, self._before = evaluator, closure, before
        self._g0 = g0
        self._after: Snapshot | None = None
        self.gradients: list[Tensor | None] = []

    def gradient(self) -> list[Tensor | None]:
        """The gradients at θ, which later evaluations don't overwrite."""
        if self._after is None:
            self._after = self._evaluator.snapshot(values=True, leaves=self._before.leaves)
        if self._evaluator.is_scaled or self._evaluator.manner(self._closure).changes_gradients:
            return list(self._g0)  # in memory of its own
        return locals_of(self._after.gradients)

    def __call__(self, copy: Sequence[Tensor]) -> Tensor:
        """Returns the loss at ``copy``, which comes back holding the gradient there."""
        self.gradient()
        self._before.restore()
        with pointing(self._evaluator.parameters, self._evaluator.modules) as hold:
            hold(copy)
            loss, there = self._evaluator.evaluate(self._closure)
            self.gradients = moved(there, copy)
        if self._evaluator.is_scaled:
            self._evaluator.scale_(self.gradients)
        return loss

    def end(self) -> None:
        """Puts back what the evaluation at θ has left."""
        if self._after is not None:
            self._after.restore()
            self._after.restore_gradients()


def check_same(once: Fingerprint, again: Fingerprint, epsilon: float = 0.0) -> None:
    """Raises a RuntimeError where two evaluations at the same θ differ by more than rounding, of a
    type of this machine epsilon if it is coarser than the gradients'.
    """
    difference = once.differs(again, epsilon)
    if difference is not None:
        raise RuntimeError(
            f"closure: two evaluations at the same θ gave {difference}; expected the same loss and "
            f"gradient every time: {ADVICE}"
        )


def copied(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients in memory of their own."""
    return [None if g is None else g.detach().clone() for g in gradients]


def _detached(loss: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """A loss that a closure returned, 0-dim; ``dtype``: of one that is a number."""
    value = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=dtype)
    return value.detach().reshape(())


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
