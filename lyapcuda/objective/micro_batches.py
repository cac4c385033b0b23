"""The training gradient of a whole minibatch, the curvature of a part of it.

`beside` evaluates the part twice more than training alone would; `accumulated` only once, since
there the part's gradient is a share of the training gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from lyapcuda.objective.batch_weights import BatchWeights, Sizes, Undecided, Weighed, Weighing
from lyapcuda.objective.evaluator import Add, Closure, Evaluator, Further, Gradients
from lyapcuda.objective.isolation import Snapshot, TrackedGradients, untracked
from lyapcuda.objective.splitting import batch_size

__all__ = ["Measured", "MicroBatches", "accumulated", "beside"]

Copies = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    """What was evaluated, and what remains to do once the copies' gradients have been used."""

    found: Gradients
    loss: Tensor
    leave: Callable[[], None] = lambda: None

    def onto(self, kept: TrackedGradients) -> Measured:
        """The same, what is left added to gradients that were there."""

        def leave() -> None:
            self.leave()
            kept.accumulate()

        return replace(self, leave=leave)


def beside(
    evaluator: Evaluator,
    part: Closure,
    whole: Closure,
    copies: Copies,
    *,
    add: Add = False,
    check: bool = False,
    further: Further | None = None,
) -> Measured:
    """Measures ``part`` without a trace, then evaluates ``whole`` as training does.

    Returns:
        The part's gradients at θ and at every copy, and the loss of the whole. ``.grad``, random
        states and buffers are what one plain evaluation of ``whole`` leaves; after an exception
        everything is as it was.
    """
    found = evaluator.gradients(part, copies, check=check, further=further)
    # The second evaluation may use their storage again (DDP's buckets). One by one, so that there
    # are never two of them all.
    for i in range(len(found.g0)):
        found.g0[i] = None if found.g0[i] is None else found.g0[i].clone()
    return Measured(found, evaluator.gradients(whole, leave=True, add=add).loss0)


@dataclass(frozen=True)
class MicroBatches:
    """Batches that one gradient is of, and how much each counts.

    Attributes:
        batches, lengths: the batches; their numbers of samples, or the sizes that were given.
        weights: what is known of how much they count.
    """

    batches: list[Any]
    lengths: list[float]
    weights: BatchWeights

    @classmethod
    def of(cls, batches: Iterable[Any], sizes: Sizes | None, weights: BatchWeights) -> MicroBatches:
        """Checks and measures them.

        Args:
            batches: as of `split_batch`.
            sizes: as of `BatchWeights`.
            weights: without ``sizes``: what is known of earlier ones.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise TypeError(
                f"batches={type(batches).__name__}: expected a sequence of batches, as of "
                "`split_batch`"
            )
        found = list(batches)
        if not found:
            raise ValueError("batches: empty, there is nothing to evaluate")
        if sizes is not None:
            weights = BatchWeights(sizes, "batches")
        lengths = weights.of(found)
        if lengths is not None:
            weights = BatchWeights(lengths, "batches")
        else:
            lengths = [batch_size(batch, "batches") for batch in found]
        return cls(found, lengths, weights)

    @property
    def factor(self) -> float:
        """How many times the last one all of them are."""
        return sum(self.lengths) / self.lengths[-1] if self.lengths[-1] else 1.0

    def last(self, evaluator: Evaluator, closure: Closure) -> tuple[Closure, float]:
        """The closure of the last batch alone, and how many times its curvature is that of all; may
        evaluate it.
        """
        many = len(self.batches) > 1
        sums = many and self.weights.adds_up(evaluator, closure, self.batches[0])
        return partial(closure, self.batches[-1]), self.factor if sums else 1.0


class _Average:
    """Gradients added up in the batches' order, each weighted by its batch's share."""

    def __init__(self, tensors: Sequence[Tensor], onto: Sequence[Tensor | None]) -> None:
        self._tensors, self._onto = list(tensors), list(onto)
        self._loose: list[Tensor] = []
        self._total: list[Tensor | None] = [None] * len(tensors)

    def extend(self, tensors: Sequence[Tensor], before: Snapshot) -> None:
        """Takes more of them, found since; ``before`` has what was in their ``.grad``."""
        for tensor in tensors[len(self._loose) :]:
            self._loose.append(tensor)
            self._tensors.append(tensor)
            self._onto.append(before.gradient_of(tensor))
            self._total.append(None)

    def add(self, weight: float, last: bool = False) -> None:
        """Takes what is in ``.grad`` now, and clears that. Nothing of it for a weight of 0."""
        for i, tensor in enumerate(self._tensors):
            gradient, total = tensor.grad, self._total[i]
            tensor.grad = None
            if gradient is None or not weight:
                continue
            gradient = gradient.detach()
            if total is not None:
                total.add_(gradient, alpha=weight)
            else:
                self._total[i] = gradient if last and weight == 1.0 else gradient * weight

    def leave(self, factor: float) -> None:
        """Puts the sum, so many times, into ``.grad``, added to what was to be kept there."""
        for tensor, total, start in zip(self._tensors, self._total, self._onto, strict=True):
            if total is not None and factor != 1.0:
                total.mul_(factor)
            if start is not None and total is not None:
                start.detach().add_(total)
            tensor.grad = total if start is None else start


class _Shares:
    """The batches' shares of the whole, as they become known.

    They are the lengths' while the weights are proportional to these, up to a common factor that
    the end shows.
    """

    def __init__(self, micro: MicroBatches, weighing: Weighing) -> None:
        self._lengths, self._all = micro.lengths, sum(micro.lengths)
        self._weighing = weighing
        self._base: tuple[float, float] | None = None

    def of(self, one: Weighed, index: int) -> float:
        """The share of one that was evaluated."""
        weight, length = one.weight(), self._lengths[index]
        if self._weighing.sums or not weight:
            return weight
        base, first = self._base = self._base or (weight, length)
        if weight * first == base * length:
            return length / self._all
        return weight * first / (base * self._all)

    def factor(self) -> float:
        """What the sum of shares is to be multiplied by."""
        total = self._weighing.finish()
        if self._weighing.sums:
            return 1.0
        base, first = self._base
        return 1.0 if total * first == base * self._all else base * self._all / (first * total)


def accumulated(
    evaluator: Evaluator,
    closure: Closure,
    micro: MicroBatches,
    copies: Copies,
    *,
    check: bool = False,
    further: Further | None = None,
) -> Measured:
    """The gradient over micro-batches; the copies see the last of them.

    Args:
        evaluator: of the tracked parameters.
        closure: called with each batch, with the last once more for every copy.
        micro: the batches.
        copies: none to evaluate the gradient only.
        check, further: as for `Evaluator.gradients`.

    Returns:
        The last batch's gradients (where losses are added up: scaled up to all samples), the mean
        of the losses, or their sum, and what is to be left: in ``.grad`` the gradient of that;
        random states and buffers are those after evaluating the batches in order. After an
        exception everything is as it was. Memory: one gradient more.
    """
    while True:
        try:
            return _accumulated(evaluator, closure, micro, copies, check, further)
        except Undecided as error:
            undecided = error.with_traceback(None)  # whose frames hold graphs
        micro.weights.decide(undecided, evaluator, closure)


def _accumulated(
    evaluator: Evaluator,
    closure: Closure,
    micro: MicroBatches,
    copies: Copies,
    check: bool,
    further: Further | None,
) -> Measured:
    if not evaluator.knows(closure):
        evaluator.survey(closure, micro.batches[0])
    before = evaluator.snapshot()
    tracked = evaluator.parameters
    others = [*untracked(tracked, evaluator.modules), *before.leaves]
    others = list({id(leaf): leaf for leaf in others}.values())
    # Theirs are added to, as in a plain backward(); the tracked ones' are replaced.
    average = _Average([*tracked, *others], [None] * len(tracked) + [p.grad for p in others])
    weighing = Weighing(micro.weights, single=len(micro.batches) == 1)
    shares = _Shares(micro, weighing)
    loss: Tensor | float = 0.0
    last = len(micro.batches) - 1
    try:
        for parameter in others:
            parameter.grad = None
        before.clears, known = True, len(before.leaves)
        for i, batch in enumerate(micro.batches[:-1]):
            one = weighing(batch, micro.lengths[i])
            with evaluator.looking(closure, before):
                value = evaluator.evaluate(partial(one.loss, closure), before, of=closure)[0]
            average.extend(before.leaves[known:], before)
            share = shares.of(one, i)
            average.add(share)
            if share:  # what counts nothing may be NaN
                loss = loss + value * share
        one = weighing(micro.batches[-1], micro.lengths[-1])
        if weighing.sums and last:
            evaluator.times = micro.factor

        def measured() -> Tensor | float:
            return one.loss(closure)

        measured.__wrapped__ = closure  # whose code this is
        found = evaluator.gradients(measured, copies, leave=True, check=check, further=further)
        share = shares.of(one, last)
        factor = shares.factor()
        if share:
            loss = loss + found.loss0 * share
    except BaseException:
        before.restore()
        before.restore_gradients()
        raise
    finally:
        evaluator.times = 1.0

    def leave() -> None:
        average.add(share, last=True)
        average.leave(factor)

    return Measured(found, loss if factor == 1.0 else loss * factor, leave)
