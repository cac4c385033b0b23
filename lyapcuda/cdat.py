"""CDAT: any optimizer's own direction, at a rate that the curvature along it allows."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lyapcuda.arguments import described, fraction, positive, whole
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.evaluator import Closure, Gradients, Probe
from lyapcuda.objective.grad_scaler import found_inf
from lyapcuda.objective.interrupts import StepLock, deferred
from lyapcuda.objective.left_gradients import guarded, note
from lyapcuda.objective.update_line import Sizes, UpdateLine
from lyapcuda.optim import LyapunovSGD
from lyapcuda.params.collect import collect
from lyapcuda.params.optimizer_state import OptimizerState
from lyapcuda.params.peak_rates import at_peak, peak_of, raise_peaks, share_of_peak
from lyapcuda.params.saved_state import require_entries
from lyapcuda.params.shards import local
from lyapcuda.params.wrapped_optimizers import unwrapped

__all__ = ["CDAT"]

#: An entry of a state_dict beside the wrapped optimizer's; what is in it.
ENTRY = "cdat"
_OWN_STATE = ("numbers", "calls", "perturbation")

#: The numbers that the steps decide, on the device: both averages, the factor, and of the last
#: measurement U·HU/‖U‖².
_SLOPE, _CURVATURE, _FACTOR, _RAYLEIGH = range(4)

_INSTEAD = "Call backward() on all micro-batches in the closure, or call"
# Of the average of every step; 0.8 of every fifth.
_EMA = 0.9


class CDAT(Optimizer):
    """Steps along another optimizer's update U, as far as the curvature along it allows: θ ← θ +
    s·U, s = sigma·max(−g·U, 0)/|U·HU|.

    Of the method of Roulet et al., "Stepping on the Edge" (arXiv 2407.06183). Along U the loss is
    lowest, to second order, at sigma = 1; at 2, the edge, it is where it was. Numerator and
    denominator are exponential moving averages. U is what the optimizer's own step does, its
    learning rate, momentum and weight decay included: its state advances once a step. Its learning
    rate cancels in s·U, so it needs no tuning; what a scheduler makes of it counts as a share of
    its largest.

    A step costs a gradient, every n-th one more, of the same minibatch at θ + εU. Nothing waits for
    the device, but for the first step, which reads ‖θ‖.

    Args:
        optimizer: SGD, Adam, AdamW, Muon, or of any class whose ``step()`` needs no closure. Groups
            and state are shared with it: schedulers and ``add_param_group`` act on both.
        sigma: how far to go: 1 is the lowest point along U, 2 the edge.
        every: measure at every n-th step; the others go on with the last factor.
        ema: weight of the past in both averages, for each measurement. Default: 0.9 to the power
            √every.
        max_step: the factor is bounded, so that at the last measurement s·‖U‖ was at most so many
            times ‖θ‖. This counts at first, and where U·HU vanishes.
        perturbation: ‖εU‖; default: as of `CurvatureTracker`, from ‖θ‖ at the first step.

    Raises:
        TypeError: no optimizer, or one whose step isn't one update from one gradient: LBFGS,
            LyapunovSGD, a CDAT, a wrapper of a training framework's.
        ValueError: naming the argument and its value; a group with ``maximize=True``.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = lyapcuda.CDAT(torch.optim.SGD([theta], lr=1e-3), every=1)
        >>> for _ in range(60):
        ...     loss = optimizer.step(lambda: theta[0].square() + 4.0 * theta[1].square())
        >>> bool(loss < 1e-6)
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sigma: float = 0.85,
        *,
        every: int = 5,
        ema: float | None = None,
        max_step: float = 0.1,
        perturbation: float | None = None,
    ) -> None:
        _check_optimizer(optimizer)
        for name, value in {"sigma": sigma, "max_step": max_step}.items():
            if value is None:
                raise ValueError(f"{name}=None: expected a positive finite number")
            positive(name, value)
        whole("every", every)
        if ema is not None:
            fraction("ema", ema)
        positive("perturbation", perturbation)
        for group in optimizer.param_groups:
            _check_group(group)
        collect(optimizer.param_groups, all_frozen=True)
        self._optimizer = optimizer
        self.sigma, self.every, self.max_step = float(sigma), int(every), float(max_step)
        self.ema = _EMA ** math.sqrt(every) if ema is None else float(ema)
        self._given = perturbation
        self._perturbation: float | None = None
        self._calls = 0
        self._finite: Tensor | None = None  # whether the present step is to be taken
        device = optimizer.param_groups[0]["params"][0].device
        self._numbers = torch.tensor(
            [0.0, 0.0, math.nan, math.nan], dtype=torch.float64, device=device
        )
        self._lock = StepLock("CDAT.step")
        self._line: UpdateLine | None = None
        super().__setstate__({})  # torch.optim's hooks; groups and state are the optimizer's

    # --- what is shared with the wrapped optimizer -----------------------------------------------

    def __repr__(self) -> str:
        """As torch's optimizers have it, around the one whose direction it takes."""
        return f"CDAT(sigma={self.sigma:g}, {self.optimizer!r})"

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer, whose update U is."""
        return self._optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self._optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self._optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self._optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self._optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the averages begin anew."""
        self._optimizer.add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            collect(self.param_groups[-1:], all_frozen=True)
        except BaseException:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    @property
    def _steps_along(self) -> Optimizer:
        """What `loss_groups` asks whether its weight decay belongs to the loss."""
        return self._optimizer

    # --- reading ---------------------------------------------------------------------------------

    @property
    def rate(self) -> Tensor:
        """s, the factor of the wrapped optimizer's update at its largest learning rate: 0-dim
        float64 on the device; NaN before the first measurement.
        """
        return self._numbers[_FACTOR].clone()

    @property
    def curvature(self) -> Tensor:
        """U·HU/‖U‖² of the last measurement, the curvature along the update; 0-dim float64."""
        return self._numbers[_RAYLEIGH].clone()

    @property
    def sharpness(self) -> Tensor:
        """2/η, η the learning rate of the first group from which on a step along U would raise the
        loss, to second order, by the averages: what `critical_sharpness` finds by forward passes.
        0-dim float64; NaN before the first measurement, infinite where U leads uphill.
        """
        return self._numbers[_CURVATURE] / (self._numbers[_SLOPE] * peak_of(self.param_groups[0]))

    # --- a step ----------------------------------------------------------------------------------

    @entry_point
    def step(self, closure: Closure | None = None) -> Tensor:
        """Takes a step of the wrapped optimizer, s times as long.

        Args:
            closure: returns the loss; may call ``backward()`` itself, and clip after that. It is
                called once, at every n-th step twice.

        Returns:
            The loss before the step, detached; ``.grad`` holds its gradient.

        Where the loss or a gradient isn't finite θ stays, and the wrapped optimizer is given zeros
        for gradients, which ``.grad`` then holds: its averages shrink, but stay finite. Where they
        aren't finite at θ + εU, the step goes on with the last factor. After an exception of the
        closure's everything is as it was, the wrapped optimizer's state included.

        Raises:
            RuntimeError: no closure; gradients that were accumulated since the last step, which the
                closure doesn't clear; a CurvatureTracker is attached.
            TypeError, ValueError: what the closure returned; sparse gradients; no parameter that
                requires a gradient.
        """
        if closure is None:
            raise RuntimeError(
                "step() without a closure: CDAT evaluates the loss a second time, beside θ: call "
                "step(closure) with a function\nthat returns the loss, "
                "optimizer.step(lambda: loss_of(batch)), in place of loss.backward() and "
                "optimizer.step()\n(a GradScaler's step() can't hand one on: use bfloat16 autocast)"
            )
        if not callable(closure):
            raise TypeError(
                f"closure={described(closure)}: expected a callable that returns the loss"
            )
        if getattr(closure, "trackers", ()):
            raise RuntimeError(
                "a CurvatureTracker is attached to this CDAT, whose step evaluates the loss at two "
                "places: remove the handle,\nand call tracker.step(closure) before it"
            )
        with deferred(), self._lock:
            return self._take_step(closure)

    def _take_step(self, closure: Closure) -> Tensor:
        line = self._present_line()
        if line.layout.ranks is not None:
            line.layout.ranks.check()
        closure, given = guarded(closure, line.parameters, line.layout.ranks, _INSTEAD), closure
        due = self._calls % self.every == 0
        try:
            if due:
                further = partial(self._measure, line)
                found = line.evaluator.gradients(closure, leave=True, further=further)
            else:
                found = line.evaluator.gradients(closure, leave=True)
                self._finite = _zeroed_unless_finite(line, found.loss0)
                self._advance(line)
        except BaseException:
            if closure is given:
                note(line.parameters)
            raise
        note(line.parameters)
        factor = self._numbers[_FACTOR]
        times = torch.where(self._finite & factor.isfinite(), factor, 0.0)
        line.move(times, [share_of_peak(group) for group in self.param_groups])
        self._calls += 1
        return found.loss0

    def _present_line(self) -> UpdateLine:
        """The flat buffers of those that require a gradient now."""
        if self._line is None or self._line.is_behind(self.param_groups):
            again = self._line is not None
            self._line = UpdateLine(self._optimizer)
            self._numbers = self._numbers.to(self._line.layout.device)
            if again:  # the averages are those of another U: this step measures
                self._numbers[:_FACTOR] = 0.0
                self._calls = -(-self._calls // self.every) * self.every
        return self._line

    def _advance(self, line: UpdateLine) -> None:
        """Has the wrapped optimizer take its step, at the groups' largest rates."""
        rise = raise_peaks(self._optimizer)
        with at_peak(self._optimizer):
            line.take_step(self._optimizer)
        # U grows with the peak: the averages are those of the new one.
        if isinstance(rise, Tensor) or rise != 1.0:
            rise = rise.to(self._numbers.device) if isinstance(rise, Tensor) else rise
            for place, times in {_SLOPE: rise, _CURVATURE: rise**2, _FACTOR: 1 / rise}.items():
                self._numbers[place].mul_(times)

    @torch.no_grad()
    def _measure(self, line: UpdateLine, found: Gradients, probe: Probe) -> None:
        """The wrapped optimizer's step, and the curvature along it."""
        self._finite = _zeroed_unless_finite(line, found.loss0)
        g0 = probe.gradient()
        if self._perturbation is None:
            self._perturbation = self._given or default_perturbation(line.layout)
        before, numbers = OptimizerState(self._optimizer), self._numbers.clone()
        try:
            self._advance(line)
            size = line.sizes()
            copy, moved = line.displaced(self._perturbation / size.update)
            probe(copy)
            products = line.products(g0, probe.gradients)
        except BaseException:
            line.put_back()
            before.restore()
            self._numbers = numbers
            raise
        self._average(products, moved, size)

    def _average(self, products: Tensor, moved: Tensor, size: Sizes) -> None:
        """Takes a measurement into the averages; nothing is read back."""
        slope, change, square, decay = products.unbind()
        # What the parameters' dtype realised of ε is moved/square.
        curvature = change * square / moved + decay
        now = torch.stack([(-slope).clamp_min(0.0), curvature.abs()])
        average = self._numbers[:_FACTOR].lerp(now, 1.0 - self.ema)
        factor = self.sigma * average[0] / average[1]
        factor = torch.minimum(factor, self.max_step * size.theta / size.update)
        new = torch.cat([average, torch.stack([factor, curvature / square])])
        counts = self._finite & new.isfinite().all()
        self._numbers = torch.where(counts, new, self._numbers)

    # --- saving ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # As torch.optim's own: without hooks, and without a scheduler's patch of `step`.
        others = ("sigma", "every", "max_step", "ema")
        ours = [n for n in self.__dict__ if n.startswith("_") and not n.startswith("_optimizer_")]
        kept = {name: self.__dict__[name] for name in (*others, *ours)}
        return {**kept, "_line": None, "_finite": None}

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's, with `ENTRY` beside it; loads with
        ``torch.load(weights_only=True)``.
        """
        for hook in tuple(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        own = (self._numbers.clone(), self._calls, self._perturbation)
        saved = {**self._optimizer.state_dict(), ENTRY: dict(zip(_OWN_STATE, own, strict=True))}
        for hook in tuple(self._optimizer_state_dict_post_hooks.values()):
            changed = hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved optimizer was.

        Raises:
            ValueError: it isn't a CDAT's, or of another optimizer or other parameters; nothing has
                changed then.
        """
        saved = dict(state_dict) if isinstance(state_dict, dict) else state_dict
        for hook in tuple(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = hook(self, saved)
            saved = saved if changed is None else changed
        require_entries(saved, ENTRY, of="a CDAT")
        own = saved[ENTRY]
        require_entries(own, *_OWN_STATE)
        numbers = own["numbers"]
        if not isinstance(numbers, Tensor) or numbers.shape != self._numbers.shape:
            raise ValueError(f"state_dict: numbers={described(numbers)}: it is damaged")
        whole("state_dict: calls", own["calls"], 0)
        positive("state_dict: perturbation", own["perturbation"])
        self._optimizer.load_state_dict({n: v for n, v in saved.items() if n != ENTRY})
        self._numbers = numbers.to(self._numbers).clone()
        self._calls, self._perturbation = int(own["calls"]), own["perturbation"]
        self._line = None
        for hook in tuple(self._optimizer_load_state_dict_post_hooks.values()):
            hook(self)


# --- what may be wrapped -------------------------------------------------------------------------


def _check_optimizer(optimizer: Any) -> None:
    """Raises a TypeError that says what to do instead."""
    told = f"optimizer={described(optimizer)}"
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise TypeError(f"{told}: expected a torch.optim.Optimizer")
    if isinstance(optimizer, CDAT):
        raise TypeError(f"{told}: is a CDAT already; wrap its .optimizer")
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            f"{told}: LBFGS takes several evaluations a step and searches the rate itself "
            "(line_search_fn); use it alone"
        )
    if isinstance(optimizer, LyapunovSGD):
        raise TypeError(
            f"{told}: LyapunovSGD measures its own rate; wrap torch.optim.SGD, or use it alone"
        )
    if unwrapped(optimizer) is not optimizer:
        raise TypeError(
            f"{told}: a wrapper around an optimizer; wrap the one inside, and hand the framework "
            "the CDAT"
        )


def _check_group(group: dict[str, Any]) -> None:
    if group.get("maximize"):
        raise ValueError("maximize=True: CDAT minimizes; negate the loss instead")


@torch.no_grad()
def _zeroed_unless_finite(line: UpdateLine, loss: Tensor) -> Tensor:
    """Whether loss and gradients are finite, a number on the device; where they aren't, ``.grad``
    is zeros afterwards.
    """
    layout = line.layout
    gradients = [local(p.grad) for p in line.parameters if p.grad is not None]
    finite = found_inf(gradients, layout.device, layout.ranks) == 0
    if layout.ranks is None:  # a loss is one rank's own
        finite = finite & loss.isfinite().to(layout.device)
    for gradient in gradients:
        gradient.masked_fill_(~finite.to(gradient.device), 0.0)
    return finite
