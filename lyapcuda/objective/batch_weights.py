"""How much each batch counts in a loss over several of them.

Where nobody says, the loss itself is read: a mean over unpadded tokens counts those, a sum isn't
averaged. What the end of autograd's graph leaves open is settled by cutting a batch in two and
comparing its loss with those of its parts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lyapcuda.objective.evaluator import Closure, Evaluator, check_loss
from lyapcuda.objective.interrupts import allowed
from lyapcuda.objective.isolation import untracked
from lyapcuda.objective.loss_graph import COARSE, loss_epsilon
from lyapcuda.objective.loss_terms import COUNTED, SEVERAL, Term, reading
from lyapcuda.objective.splitting import batch_size, split_batch, tensors_of

__all__ = ["BatchWeights", "Sizes", "Undecided", "Weighed", "Weighing"]

#: A number a batch, a function of a batch, or "sum".
Sizes = Sequence[float] | Callable[[Any], float | Tensor] | Tensor | str

#: How batches are weighted: by lengths; by the count of a term of the loss, or of labels (its
#: place; whether shifted); by lengths as long as all of the counts at some places are proportional
#: to them; not, since losses are added up.
Rule = tuple[str, Any]
_LENGTHS, _COUNTS, _LABELS, _SUM = "lengths", "counts", "labels", "sum"
_LIKE_COUNTS, _LIKE_LABELS = "like counts", "like labels"
#: torch's default of ignore_index.
_IGNORED = -100
_SAYS = {
    _LENGTHS: "the length of its first tensor",
    _LIKE_COUNTS: "the length of its first tensor",
    _LIKE_LABELS: "the length of its first tensor",
    _COUNTS: "how many numbers its loss averages over",
    _LABELS: f"how many of its labels aren't {_IGNORED}",
    _SUM: "one: the loss is a sum, and is added up",
}
# Losses are explained up to this share of them, where they were computed finely and coarsely; sums
# are told from means where they fit so many times better, and up to this share.
_FINE, _COARSE, _BETTER, _NEAR = 1e-5, 3e-3, 4.0, 0.3


class Undecided(Exception):
    """What a batch counts doesn't show in one evaluation; `BatchWeights.decide` goes on."""

    def __init__(self, batch: Any, terms: Sequence[Term]) -> None:
        super().__init__("the batches' weights aren't known yet")
        self.batch, self.terms = batch, terms


class BatchWeights:
    """How much each batch counts.

    Args:
        sizes: a number a batch, a function of a batch that returns one (or a 0-dim tensor), or
            "sum": losses are added up, not averaged. None reads it off the losses.
        name: of the argument that has the batches, for messages.

    Attributes:
        taken: the weights of the last pass.
        divisor: what was divided by then.

    Raises:
        TypeError, ValueError: naming sizes.

    Example:
        >>> weights = BatchWeights([3, 1])
        >>> weights.by
        'sizes='
    """

    def __init__(self, sizes: Sizes | None = None, name: str = "data") -> None:
        self.name, self.sizes = name, sizes
        self.taken: list[float] = []
        self.divisor = 1.0
        self._rules: dict[frozenset, Rule] = {}
        #: Those that hold for one pass, in which a loss wasn't finite.
        self._passing: set[frozenset] = set()
        if isinstance(sizes, str):
            if sizes != "sum":
                raise ValueError(
                    f'sizes={sizes!r}: expected "sum" (losses are added up), one number a batch, '
                    "or a function of a batch"
                )
        elif isinstance(sizes, Tensor):
            self.sizes = sizes.detach().reshape(-1).tolist()
        elif isinstance(sizes, Iterable) and not isinstance(sizes, Mapping):
            self.sizes = list(sizes)
        elif sizes is not None and not callable(sizes):
            raise TypeError(
                f'sizes={sizes!r}: expected one number a batch, a function of a batch, or "sum"'
            )
        if isinstance(self.sizes, list):
            self.sizes = [_checked(size, i) for i, size in enumerate(self.sizes)]
            if not any(self.sizes):
                raise ValueError("sizes: all are zero; at least one batch has to count")

    @property
    def by(self) -> str:
        """What a batch counts, in words; empty before the first pass."""
        if self.sizes is not None:
            return "sizes=" + ("sum" if self.sizes == "sum" else "")
        if not self.reads:
            return _SAYS[_LENGTHS]
        return ", or ".join(dict.fromkeys(_SAYS[rule] for rule, _ in self._rules.values()))

    @property
    def reads(self) -> bool:
        """Whether losses are read. Not by one of several processes, which average their gradients:
        they see other losses, and have to agree.
        """
        return self.sizes is None and _alone()

    def of(self, batches: Sequence[Any]) -> list[float] | None:
        """The sizes given for these batches; None where there are none but "sum"."""
        if self.sizes is None or isinstance(self.sizes, str):
            return None
        self.check_count(len(batches))
        if isinstance(self.sizes, list):
            return self.sizes
        later = [_Later(self.sizes(batch)) for batch in batches]  # one wait for all
        return [_checked(number.value(), i) for i, number in enumerate(later)]

    def adds_up(self, evaluator: Evaluator, closure: Closure, batch: Any) -> bool:
        """Whether losses are added up, from a forward pass over one batch."""
        if not self.reads:
            return self.sizes == "sum"
        terms = _evaluated(evaluator, closure, [batch], ()).terms[0]
        if self.rule(terms) is None:
            self.decide(Undecided(batch, terms), evaluator, closure)
        return self.rule(terms)[0] == _SUM

    def check_count(self, count: int) -> None:
        """Raises a ValueError where there isn't one size a batch."""
        if isinstance(self.sizes, list) and len(self.sizes) != count:
            raise ValueError(
                f"sizes: {len(self.sizes)} numbers, but {self.name} has {count} batches; pass one "
                "a batch, or a function of a batch"
            )

    # --- deciding --------------------------------------------------------------------------------

    def rule(self, terms: Sequence[Term]) -> Rule | None:
        """How batches with such a loss are weighted; None where one evaluation doesn't tell."""
        signature = _signature(terms)
        if signature not in self._rules:
            rule = _plain(terms)
            if rule is None:
                return None
            self._rules[signature] = rule
        return self._rules[signature]

    def decide(
        self,
        undecided: Undecided,
        evaluator: Evaluator,
        closure: Closure,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        """Settles how such batches are weighted, by forward passes over this one and its parts.

        They start from the same random states and buffers, and leave no trace.

        Warns:
            UserWarning: no weights explain the loss; says which are taken.
        """
        batch, terms = undecided.batch, undecided.terms
        rule, exact, seen = None, False, None
        try:
            parts = (batch, *split_batch(batch, 0.3))
            lengths = [float(batch_size(part, self.name)) for part in parts]
        except Exception:  # data that can't be cut
            parts = ()
        # Dropout and BatchNorm hide what is looked for; torch's modules leave them out in eval.
        for mode in (nullcontext, partial(_evaluating, evaluator.modules)) if parts else ():
            try:
                with mode():
                    seen = _evaluated(evaluator, closure, parts, generators)
            except Exception:  # of a closure of full batches alone, or of training alone
                continue
            found, exact = _explained(terms, lengths, seen, parts)
            rule = found or rule
            if exact or not any(module.training for module in evaluator.modules):
                break
        signature = _signature(terms)
        if seen is not None and not all(map(math.isfinite, seen.losses)):
            self._rules[signature] = _LENGTHS, 0
            self._passing.add(signature)
            return
        watched = signature in self._rules
        if rule is None or watched and rule[0] in (_LIKE_COUNTS, _LIKE_LABELS):
            rule, exact = _plausible(terms, seen), False
        alike = seen is not None and _proportional(terms, lengths[1:], seen)
        if rule[0] == _LENGTHS and not exact and not alike:
            taken = "the length of its first tensor is taken"
            self._warn(terms, "doesn't show in its loss", taken)
        elif not exact and len(terms) > 1 and _plausible(terms, seen)[0] == _LENGTHS and not alike:
            what = "added up" if rule[0] == _SUM else "averaged by the counts of one term"
            self._warn(terms, "differs by its loss's terms", f"losses are {what}")
        self._rules[signature] = rule

    def end_pass(self, taken: list[float], divisor: float) -> None:
        """Takes note of the weights of a pass."""
        self.taken, self.divisor = taken, divisor
        for signature in self._passing:
            self._rules.pop(signature, None)
        self._passing.clear()

    def _warn(self, terms: Sequence[Term], what: str, taken: str) -> None:
        names = ", ".join(dict.fromkeys(term.name for term in terms if term.kind != "unknown"))
        if names:
            warnings.warn(
                f"{self.name}: how much each batch counts {what} ({names}): {taken}. Say it by "
                'sizes=: a number a batch, a function of a batch, or "sum"',
                stacklevel=2,
            )


class Weighing:
    """One pass over the batches, in which each is weighted.

    Args:
        weights: how.
        single: there is one batch, whose weight is of no matter.

    Attributes:
        sums: whether losses are added up.
        taken: the weights so far.
    """

    def __init__(self, weights: BatchWeights, single: bool = False) -> None:
        self.weights, self.single = weights, single
        self.sums = weights.sizes == "sum"
        self.taken: list[float] = []
        self._ratios: dict[frozenset, list[float]] = {}

    def __call__(self, batch: Any, length: int) -> Weighed:
        """The next batch; ``length`` is how many samples it has."""
        return Weighed(self, batch, length, len(self.taken))

    def rule(self, batch: Any, terms: Sequence[Term], length: int) -> Rule | None:
        """How a batch with such a loss is weighted; None where that isn't decided."""
        rule = self.weights.rule(terms)
        if rule is None:
            counts = [term.count for term in terms]
            void = all(count is not None and float(count) == 0.0 for count in counts)
            return (_COUNTS, 0) if void else None
        if rule[0] not in (_LIKE_COUNTS, _LIKE_LABELS):
            return rule
        kind, places = rule
        if kind == _LIKE_LABELS:
            counts = [float(_labelled(batch, shifted)) for shifted in (False, True)]
        else:
            found = [terms[i].count for i in places if i < len(terms)]
            counts = [float(count) for count in found if count is not None]
        if counts and not any(counts):
            return (_COUNTS, places[0]) if kind == _LIKE_COUNTS else (_LABELS, 0)
        base = self._ratios.setdefault(_signature(terms), [*counts, float(length)])
        if len(base) != len(counts) + 1:
            return None
        same = all(c * base[-1] == b * length for c, b in zip(counts, base[:-1], strict=True))
        return (_LENGTHS, 0) if same else None

    def finish(self) -> float:
        """What sums of weighted numbers are to be divided by.

        Raises:
            ValueError: no batch counts, or there are not as many sizes as batches.
        """
        self.weights.check_count(len(self.taken))
        total = sum(self.taken)
        if not total > 0.0:
            raise ValueError(
                f"{'sizes' if self.weights.sizes is not None else self.weights.name}: no batch "
                "counts, all weights are zero; at least one has to (are all labels ignored?)"
            )
        divisor = 1.0 if self.sums else total
        self.weights.end_pass(self.taken, divisor)
        return divisor


class Weighed:
    """A batch of one pass; its loss is evaluated first, its weight is known then.

    Attributes:
        is_void: known to count nothing before it is evaluated.
    """

    def __init__(self, weighing: Weighing, batch: Any, length: int, index: int) -> None:
        self._weighing, self.batch, self._length, self._index = weighing, batch, length, index
        sizes = weighing.weights.sizes
        if isinstance(sizes, list):
            length = sizes[index] if index < len(sizes) else 1.0  # `finish` says so
        elif sizes is not None:
            length = sizes(batch) if callable(sizes) else 1.0
        self._number = _Later(length)
        self._weight: float | None = None
        self._counted = False
        self.is_void = not self._number.waits and self.weight() == 0.0

    def loss(self, closure: Closure) -> Tensor | float:
        """Returns the closure's loss of the batch.

        Raises:
            Undecided: what it counts isn't known yet.
        """
        weighing = self._weighing
        if not weighing.weights.reads or weighing.single:
            return closure(self.batch)
        with reading() as seen:
            loss = closure(self.batch)
        graph = seen.roots or isinstance(loss, Tensor) and loss.requires_grad
        if not graph and not isinstance(loss, float):
            return loss  # an error, by and by
        terms = seen.terms(loss)
        rule = weighing.rule(self.batch, terms, self._length)
        if rule is None:
            raise Undecided(self.batch, terms)
        kind, which = rule
        if self._index == 0 and kind == _SUM:
            weighing.sums = True
        if weighing.sums:
            self._number, self._weight = _Later(1.0), None
        elif kind == _COUNTS and which < len(terms) and terms[which].count is not None:
            self._number, self._weight, self._counted = _Later(terms[which].count), None, True
        elif kind == _LABELS:
            self._number, self._weight = _Later(_labelled(self.batch, bool(which))), None
        return loss

    def weight(self) -> float:
        """How much it counts."""
        if self._weight is None:
            value = self._number.value()
            if self._counted and not math.isfinite(float(value)):
                value = self._length
            self._weight = _checked(value, self._index)
            del self._weighing.taken[self._index :]
            self._weighing.taken.append(self._weight)
        return self._weight


class _Later:
    """A number that a device may still be computing; waiting for it is left until it is needed."""

    def __init__(self, number: Any) -> None:
        self._number, self._event = number, None
        self.waits = isinstance(number, Tensor) and number.device.type != "cpu"
        if self.waits and number.is_cuda and number.numel() == 1:
            here = torch.empty((), dtype=number.dtype, pin_memory=True)
            here.copy_(number.detach().reshape(()), non_blocking=True)
            self._number, self._event = here, torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(number.device))

    def value(self) -> Any:
        if self._event is not None:
            self._event.synchronize()
        return self._number


def _checked(size: Any, index: int) -> float:
    """A size as a float. Raises TypeError, ValueError where it is none."""
    try:
        value = float(size)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"sizes: a {type(size).__name__} for batch {index}; expected a number or a 0-dim tensor"
        ) from None
    if not 0.0 <= value < math.inf:
        raise ValueError(
            f"sizes: {value:g} for batch {index}; expected finite numbers of at least 0"
        )
    return value


def _alone() -> bool:
    """Whether this is the only process."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there or torch.distributed.get_world_size() == 1


def _signature(terms: Sequence[Term]) -> frozenset:
    return frozenset(term.signature for term in terms)


def _plain(terms: Sequence[Term]) -> Rule | None:
    """The rule where one evaluation tells it."""
    first = terms[0]
    if len(terms) == 1 and first.name.startswith(COUNTED) and not first.scaled:
        if first.kind in ("mean", "sum"):
            return (_COUNTS if first.kind == "mean" else _SUM), 0
    if all(term.kind == "mean" and not term.scaled for term in terms):
        return _LIKE_COUNTS, tuple(range(len(terms)))
    return (_LENGTHS, 0) if len(terms) == 1 and first.name == SEVERAL else None


def _plausible(terms: Sequence[Term], seen: _Seen | None) -> Rule:
    """The rule where losses of parts don't tell: what the loss's own functions say, if they agree
    (torch's losses know their reduction, but a sum may be one over the entries of a mean).
    """
    if seen is not None:
        counts = {i: seen.counts(terms, i) for i in range(len(terms))}
        found = {i: [c / sum(row) for c in row] for i, row in counts.items() if row is not None}
        first = next(iter(found), None)
        if first is None or any(not _close(row, found[first]) for row in found.values()):
            return _LENGTHS, 0
        return _COUNTS, first
    counts = [float(term.count) if term.kind == "mean" else math.nan for term in terms]
    if all(count == counts[0] for count in counts):
        return _COUNTS, 0
    known = all(term.kind == "sum" and term.name not in ("Sum", "Nansum") for term in terms)
    return (_SUM if known else _LENGTHS), 0


def _close(row: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(row, other, strict=True))


@dataclass
class _Seen:
    """Losses of a batch and of its two parts, and their terms."""

    losses: list[float] = field(default_factory=list)
    terms: list[tuple[Term, ...]] = field(default_factory=list)
    epsilon: float = 0.0

    def counts(self, terms: Sequence[Term], i: int) -> list[float] | None:
        """The parts' counts of one term; None where they don't add up to that of the whole."""
        alike = [t[i] for t in self.terms if i < len(t) and t[i].signature == terms[i].signature]
        counts = [float(term.count) for term in alike if term.count is not None]
        adds_up = len(counts) == 3 and math.isclose(sum(counts[1:]), counts[0], rel_tol=1e-6)
        return counts[1:] if adds_up and counts[0] > 0 else None


def _evaluated(
    evaluator: Evaluator,
    closure: Closure,
    parts: Iterable[Any],
    generators: Iterable[torch.Generator],
) -> _Seen:
    """Evaluates a closure's loss of each part, from the same states, which are put back."""
    before, found = evaluator.snapshot(generators), _Seen()
    others = untracked(evaluator.parameters, evaluator.modules)
    try:
        for part in parts:
            before.restore()
            for parameter in chain(evaluator.parameters, others):
                parameter.grad = None
            torch.clear_autocast_cache()
            with reading() as seen, torch.enable_grad(), allowed():
                loss = closure(part)
            check_loss(loss)
            found.terms.append(seen.terms(loss))
            found.epsilon = max(found.epsilon, loss_epsilon(loss))
            found.losses.append(float(loss.detach() if isinstance(loss, Tensor) else loss))
            del loss, seen
    finally:
        torch.clear_autocast_cache()
        before.restore()
        before.restore_gradients()
    return found


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the modules are in evaluation mode."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _proportional(terms: Sequence[Term], lengths: Sequence[float], seen: _Seen) -> bool:
    """Whether all counts that add up are proportional to the parts' lengths, and some do."""
    found = [c for c in (seen.counts(terms, i) for i in range(len(terms))) if c is not None]
    return bool(found) and all(c[0] * lengths[1] == c[1] * lengths[0] for c in found)


def _labelled(batch: Any, shifted: bool) -> Tensor | float:
    """How many labels of a batch aren't ignored, without the first of each sequence or with it; 0
    where there are no labels of sequences.
    """
    named = batch.items() if isinstance(batch, Mapping) else ()
    whole = [value for name, value in named if "label" in str(name)] or [batch]
    found = [t for t in tensors_of(whole) if t.dtype == torch.long and t.dim() > 1]
    if not found:
        return 0.0
    return ((found[-1][:, 1:] if shifted else found[-1]) != _IGNORED).sum()


def _explained(
    terms: Sequence[Term], lengths: Sequence[float], seen: _Seen, parts: Sequence[Any]
) -> tuple[Rule | None, bool]:
    """The rule by which a batch's loss follows from those of its parts, None where none does; and
    whether it does exactly.
    """
    whole, scale = seen.losses[0], max(map(abs, seen.losses))
    exact = scale * (_COARSE if seen.epsilon > COARSE else _FINE)
    if not 0.0 < scale < math.inf:
        return None, False

    def error(weights: Sequence[float]) -> float:
        parts = zip(weights, seen.losses[1:], strict=True)
        return abs(sum(w * loss for w, loss in parts if w) / sum(weights) - whole)

    means = {(_LENGTHS, 0): error(lengths[1:])}
    for i in range(len(terms)):
        counts = seen.counts(terms, i)
        if counts is not None:
            means[_COUNTS, i] = error(counts)
    hidden = all(term.kind == "unknown" for term in terms)
    for shifted in (0, 1) if hidden else ():  # compiled, or a function of the user's own
        counts = [float(_labelled(part, bool(shifted))) for part in parts[1:]]
        if sum(counts) > 0:
            means[_LABELS, shifted] = error(counts)
    as_sum, best = abs(sum(seen.losses[1:]) - whole), min(means.values())
    may_sum = any(term.kind in ("sum", "ratio") or term.scaled for term in terms)
    near = scale * _NEAR if may_sum else 10.0 * exact
    only_means = all(term.kind == "mean" and not term.scaled for term in terms)
    if not only_means and as_sum < near and as_sum * _BETTER < best:
        return (_SUM, 0), as_sum <= exact
    if not only_means and as_sum <= best * _BETTER:
        return None, False
    fits = [rule for rule, e in means.items() if e <= exact]
    if len(fits) > 1 and (_LENGTHS, 0) in fits:  # alike here, and maybe not in other batches
        if hidden:
            return (_LIKE_LABELS, 0), True
        return (_LIKE_COUNTS, tuple(i for kind, i in fits if kind == _COUNTS)), True
    if fits:
        return fits[-1], True
    if hidden:
        return None, False
    rule = min(means, key=means.get)
    return (rule if means[rule] * _BETTER < means[_LENGTHS, 0] else None), False
