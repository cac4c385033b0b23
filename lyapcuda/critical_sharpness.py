"""Critical sharpness: how far along an optimizer's update the loss stays below its present value,
by forward passes alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lyapcuda.arguments import described, positive, proper_fraction, whole
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.evaluator import Closure
from lyapcuda.objective.fixed_objective import FixedObjective
from lyapcuda.objective.interrupts import deferred
from lyapcuda.objective.update_line import UpdateLine
from lyapcuda.params.collect import Parameters
from lyapcuda.params.optimizer_state import OptimizerState

__all__ = ["CriticalSharpness", "critical_sharpness"]

# Where nothing says how large a rate is: a step of this share of ‖θ‖.
_SHARE = 0.01
# How far beyond a rate that a parabola foretells it may lead at once.
_MOST_GROWTH = 4.0
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True)
class CriticalSharpness:
    """What a search along an update has found.

    Attributes:
        sharpness: 2/rate.
        rate: η_c, the learning rate from which on the loss is above its value at θ. Infinite where
            it didn't rise at any rate that was tried, 0 where it did at all of them, NaN where it
            isn't finite at θ.
        evaluations: forward passes.
        converged: whether the loss was seen at or below its value at θ at a rate within ``tol``
            below ``rate``, and above it within ``tol`` beyond. Elsewhere ``rate`` was not found.
    """

    sharpness: float
    rate: float
    evaluations: int
    converged: bool


@entry_point
def critical_sharpness(
    closure: Closure,
    optimizer: Optimizer | Parameters,
    *,
    direction: Sequence[Tensor] | None = None,
    start: float | None = None,
    tol: float = 0.05,
    max_evaluations: int = 20,
) -> CriticalSharpness:
    """Searches for the smallest learning rate at which a step would raise the loss; its sharpness
    is 2 over that.

    Of Kalra et al. (arXiv 2601.16979). On a quadratic loss, along −g, it is g·Hg/‖g‖². Call it
    after ``backward()``: the update is what ``optimizer.step()`` would do with what is in ``.grad``
    now, its momentum and weight decay included, and scaled by the rate as a whole. With several
    groups the rate is the first one's, and the others' go with it.

    All evaluations see the same random numbers and buffers. Parameters, ``.grad``, the optimizer's
    state, buffers and random states are as before afterwards, bitwise, after an exception too. Its
    step hooks aren't called.

    The search doubles the rate until the loss rises, or halves it until it doesn't; then it goes
    where a parabola foretells. So it takes 5 or 6 evaluations from a rate near by, and may miss
    where the loss rises and falls again between two rates.

    Args:
        closure: returns the loss, without autograd's graph. One that calls ``backward()`` itself is
            run with the graph, which costs that much more.
        optimizer: whose update; with ``direction`` also parameters alone.
        direction: the update at a rate of 1 instead: tensors like the parameters that require a
            gradient, in the optimizer's order.
        start: the first rate to try, such as that of the last call. Default: the first group's
            "lr"; where there is none, a step of a hundredth of ‖θ‖.
        tol: relative width of the bracket to stop at.
        max_evaluations: forward passes at most, the one at θ included.

    Raises:
        TypeError, ValueError: naming the argument and its value.
        RuntimeError: no gradient in ``.grad``, so no update; or what the optimizer's step raises
            without a closure.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> closure = lambda: 1.5 * theta[0].square() + 1.5 * theta[1].square()
        >>> optimizer = torch.optim.SGD([theta], lr=0.1)
        >>> closure().backward()
        >>> round(lyapcuda.critical_sharpness(closure, optimizer).sharpness, 6)
        3.0
    """
    if not callable(closure):
        raise TypeError(f"closure={described(closure)}: expected a callable that returns the loss")
    positive("start", start)
    proper_fraction("tol", tol)
    whole("max_evaluations", max_evaluations, 3)
    optimizer = getattr(optimizer, "_steps_along", optimizer)  # CDAT's
    _check_source(optimizer, direction)
    line = UpdateLine(optimizer)
    unit = 1.0
    with deferred():
        if direction is None:
            unit = _own_update(line, optimizer)
        else:
            line.take(_checked(direction, line.parameters))
    sizes = line.sizes()
    size = float(sizes.update)
    if not 0 < size < math.inf:
        raise ValueError(f"direction: its norm is {size:g}: there is nowhere to go")
    if start is None:
        start = _first_rate(optimizer) or _SHARE * float(sizes.theta) / size * unit
    objective = FixedObjective(line.evaluator, closure)
    losses = _Losses(objective, line, unit)
    return _search(losses, start, tol, max_evaluations)


def _check_source(optimizer: Optimizer | Parameters, direction: Sequence[Tensor] | None) -> None:
    if direction is not None:
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={described(optimizer)}: expected a torch.optim.Optimizer; for parameters "
            "alone pass direction="
        )
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "optimizer=<LBFGS>: its step takes several evaluations, so it has no update of one "
            "gradient: pass direction="
        )


def _first_rate(optimizer: Optimizer | Parameters) -> float:
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else [{}]
    return float(groups[0].get("lr", 0.0))


def _checked(direction: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    tensors = list(direction) if not isinstance(direction, Tensor) else []
    if not all(isinstance(t, Tensor) for t in tensors) or [t.shape for t in tensors] != [
        p.shape for p in parameters
    ]:
        raise ValueError(
            f"direction={described(direction)}: expected {len(parameters)} tensors shaped like the "
            "parameters that require a gradient"
        )
    return [t.detach() for t in tensors]


def _own_update(line: UpdateLine, optimizer: Optimizer) -> float:
    """Takes what the optimizer's step would do as the line's update, and puts back all that it
    changed; returns the rate that this is of.
    """
    if all(p.grad is None for p in line.parameters):
        raise RuntimeError(
            "critical_sharpness: no parameter has a gradient, so there is no update: call "
            "loss.backward() before, or pass direction="
        )
    unit = _first_rate(optimizer)
    if "lr" in optimizer.param_groups[0] and not unit:
        raise ValueError("optimizer: the first group's lr is 0, so its update is nothing")
    before, rest = OptimizerState(optimizer), line.evaluator.snapshot(values=True)
    try:
        for name in _HOOKS:
            optimizer.__dict__[name] = OrderedDict()
        line.take_step(optimizer)
    except Exception as error:
        error.add_note("critical_sharpness: this was optimizer.step(), called for its update")
        raise
    finally:
        line.put_back()
        before.restore()
        rest.restore()
        rest.restore_gradients()
    return unit or 1.0


class _Losses:
    """The loss along a line, as a function of the rate.

    Args:
        objective: the loss at any θ.
        line: from θ along U.
        unit: the rate that U is of.
    """

    def __init__(self, objective: FixedObjective, line: UpdateLine, unit: float) -> None:
        self._objective, self._line, self._unit = objective, line, unit
        self._graph = False

    def __call__(self, rate: float) -> float:
        """The loss there: over the ranks, where several share the parameters, their mean."""
        device = self._line.layout.device
        step = torch.full((), rate / self._unit, dtype=torch.float64, device=device)
        copies, _ = self._line.displaced(step)
        loss = self._at(copies).double().to(device)
        ranks = self._line.layout.ranks
        return float(loss if ranks is None else ranks.exchange([], loss.reshape(1), now=True)[1])

    def _at(self, copies: Sequence[Tensor]) -> Tensor:
        if self._graph:
            return self._objective.loss_at(copies)
        try:
            return self._objective.loss_at(copies, graph=False)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
        self._graph = True  # it calls backward() itself
        return self._objective.loss_at(copies)


@dataclass
class _Bracket:
    """Rates at which the loss is not above its value at θ (``low``), and above it (``high``), each
    with (loss − that)/rate: on a quadratic loss a straight line, with its zero at η_c.
    """

    low: float = 0.0
    high: float = math.inf
    at_low: float = math.nan
    at_high: float = math.nan
    #: What the ends' values count, next to each other: less, where the other end alone moves.
    weight: float = 1.0

    def take(self, rate: float, rise: float) -> None:
        """``rise``: loss − loss at θ."""
        if rise <= 0:
            self.weight = 0.5 * min(self.weight, 1.0) if self.low else 1.0
            self.low, self.at_low = rate, rise / rate
        else:  # NaN too
            self.weight = 2.0 * max(self.weight, 1.0) if self.high < math.inf else 1.0
            self.high, self.at_high = rate, rise / rate if rise < math.inf else math.nan

    def zero(self, weight: float = 1.0) -> float:
        """Where a straight line through both ends is 0, with the upper one's value times
        ``weight``; halfway, where it tells nothing.
        """
        upper = self.at_high * weight
        part = -self.at_low / (upper - self.at_low) if upper > self.at_low else 0.5
        return self.low + part * (self.high - self.low)


def _search(
    loss_at: Callable[[float], float], start: float, tol: float, most: int
) -> CriticalSharpness:
    """The search of `critical_sharpness`, for any function of the rate."""
    level = loss_at(0.0)
    if not math.isfinite(level):
        return CriticalSharpness(math.nan, math.nan, 1, False)
    bracket, rate, tried = _Bracket(), start, []
    for evaluations in range(2, most + 1):
        rise = loss_at(rate) - level
        tried.append((rate, rise / rate))
        bracket.take(rate, rise)
        if 0 < bracket.low >= (1.0 - tol) * bracket.high:
            found = bracket.zero()
            return CriticalSharpness(2.0 / found, found, evaluations, True)
        rate = _next_rate(bracket, tried, tol)
    if math.isinf(bracket.high):
        return CriticalSharpness(0.0, math.inf, most, False)
    if not bracket.low:
        return CriticalSharpness(math.inf, 0.0, most, False)
    found = bracket.zero()
    return CriticalSharpness(2.0 / found, found, most, False)


def _next_rate(bracket: _Bracket, tried: Sequence[tuple[float, float]], tol: float) -> float:
    """The next rate to try, after those ``tried`` with their (loss − that at θ)/rate."""
    margin = 0.45 * tol
    if math.isinf(bracket.high) or not bracket.low:
        last = tried[-1][0]
        grow = math.isinf(bracket.high)
        zero = _foretold(tried)
        if not (zero > last if grow else 0 < zero < last):
            return 2.0 * last if grow else 0.5 * last
        if grow:
            return min(zero * (1.0 + margin), _MOST_GROWTH * last)
        return max(zero * (1.0 - margin), last / _MOST_GROWTH)
    zero = bracket.zero(bracket.weight)  # the Illinois method's
    below, above = zero * (1.0 - margin), zero * (1.0 + margin)
    # A little beyond it, on the side of the end that is farther: two such rates end the search.
    rate = above if bracket.high - zero > zero - bracket.low else below
    return rate if bracket.low < rate < bracket.high else 0.5 * (bracket.low + bracket.high)


def _foretold(tried: Sequence[tuple[float, float]]) -> float:
    """Where a straight line through the last two is 0; NaN where it isn't."""
    if len(tried) < 2:
        return math.nan
    (a, at_a), (b, at_b) = tried[-2:]
    return b - at_b * (b - a) / (at_b - at_a) if at_b != at_a else math.nan
