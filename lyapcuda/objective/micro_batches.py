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

from lyapcuda.arguments import proper_fraction
from lyapcuda.objective.batches import batch_size
from lyapcuda.objective.evaluator import Add, Closure, Evaluator, Further, Gradients
from lyapcuda.objective.isolation import TrackedGradients, untracked

__all__ = ["Measured", "accumulated", "beside", "shares", "split_batch"]

Copies = Sequence[Sequence[Tensor]]


def split_batch(batch: Any, fraction: float = 0.1) -> tuple[Any, Any]:
    """Cuts a minibatch in two along its first dimension: (the rest, the part to measure).

    Args:
        batch: a tensor, or tuples, lists and mappings of them, all of one length.
        fraction: the second part's share, in (0, 1); at least one sample, and one is left.

    Raises:
        ValueError: no tensors, tensors of different lengths, fewer than two samples.

    Example:
        >>> rest, part = split_batch((torch.arange(10), torch.arange(10)), fraction=0.2)
        >>> part
        (tensor([8, 9]), tensor([8, 9]))
    """
    proper_fraction("fraction", fraction)
    size = batch_size(batch, "batch")
    if size < 2:
        raise ValueError(f"batch: {size} sample can't be cut in two")
    cut = size - min(max(round(size * fraction), 1), size - 1)
    return _slice(batch, slice(0, cut), size), _slice(batch, slice(cut, size), size)


def _slice(batch: Any, span: slice, size: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or len(batch) != size:
            raise ValueError(f"batch: a tensor of shape {tuple(batch.shape)} beside {size} samples")
        return batch[span]
    if isinstance(batch, Mapping):
        return {name: _slice(value, span, size) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_slice(value, span, size) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    raise ValueError(f"batch: can't cut a {type(batch).__name__}")


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


def shares(batches: Iterable[Any]) -> list[tuple[Any, float]]:
    """The batches with their shares of all samples."""
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches={type(batches).__name__}: expected a sequence of batches, as of `split_batch`"
        )
    found = [(batch, batch_size(batch, "batches")) for batch in batches]
    total = sum(size for _, size in found)
    if not total:
        raise ValueError("batches: empty, there is nothing to evaluate")
    return [(batch, size / total) for batch, size in found]


class _Average:
    """Gradients added up in the batches' order, each weighted by its batch's share."""

    def __init__(self, tensors: Sequence[Tensor], onto: Sequence[Tensor | None]) -> None:
        self._tensors, self._onto = tensors, onto
        self._total: list[Tensor | None] = [None] * len(tensors)

    def add(self, weight: float) -> None:
        """Takes what is in ``.grad`` now, and clears that."""
        for i, tensor in enumerate(self._tensors):
            gradient, total = tensor.grad, self._total[i]
            tensor.grad = None
            if gradient is None:
                continue
            gradient = gradient.detach()
            if total is not None:
                total.add_(gradient, alpha=weight)
            else:
                self._total[i] = gradient if weight == 1.0 else gradient * weight

    def leave(self) -> None:
        """Puts the sum into ``.grad``, added to what was to be kept there."""
        for tensor, total, start in zip(self._tensors, self._total, self._onto, strict=True):
            if start is not None and total is not None:
                start.detach().add_(total)
            tensor.grad = total if start is None else start


def accumulated(
    evaluator: Evaluator,
    closure: Closure,
    batches: Sequence[tuple[Any, float]],
    copies: Copies,
    *,
    check: bool = False,
    further: Further | None = None,
) -> Measured:
    """The gradient averaged over micro-batches; the copies see the last of them.

    Args:
        evaluator: of the tracked parameters.
        closure: called with each batch, with the last once more for every copy.
        batches: from `shares`.
        copies: none to evaluate the average only.
        check, further: as for `Evaluator.gradients`.

    Returns:
        The last batch's gradients, the average of the losses, and what is to be left: in ``.grad``
        the average gradient, weighted by the batches' sizes; random states and buffers are those
        after evaluating the batches in order. After an exception everything is as it was. Memory:
        one gradient more.
    """
    before = evaluator.snapshot()
    tracked, others = evaluator.parameters, untracked(evaluator.parameters, evaluator.modules)
    # Theirs are added to, as in a plain backward(); the tracked ones' are replaced.
    average = _Average([*tracked, *others], [None] * len(tracked) + [p.grad for p in others])
    loss: Tensor | float = 0.0
    try:
        for parameter in others:
            parameter.grad = None
        for batch, weight in batches[:-1]:
            with evaluator.looking(closure, before):
                value = evaluator.evaluate(partial(closure, batch), before, of=closure)[0]
            average.add(weight)
            loss = loss + value * weight
        batch, weight = batches[-1]
        found = evaluator.gradients(
            partial(closure, batch), copies, leave=True, check=check, further=further
        )
    except BaseException:
        before.restore()
        before.restore_gradients()
        raise

    def leave() -> None:
        average.add(weight)
        average.leave()

    return Measured(found, loss + found.loss0 * weight, leave)
