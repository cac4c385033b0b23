"""LyapunovSGD: stochastic gradient descent whose learning rates follow the curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lyapcuda import ops
from lyapcuda.arguments import (
    choice,
    described,
    fraction,
    non_negative,
    positive,
    proper_fraction,
    users_level,
    whole,
)
from lyapcuda.dynamics.options import AUTO
from lyapcuda.objective.batch_weights import Sizes
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.evaluator import Closure
from lyapcuda.objective.grad_scaler import Unscaled, found_inf
from lyapcuda.objective.isolation import capturing
from lyapcuda.objective.left_gradients import guarded, note
from lyapcuda.objective.loss_multiple import AsItIs
from lyapcuda.params.collect import Parameters, collect, require_iterable
from lyapcuda.params.flat import FlatGroup
from lyapcuda.params.ranks import Ranks
from lyapcuda.params.saved_state import require_entries
from lyapcuda.params.shards import local
from lyapcuda.params.shards import whole as whole_tensor
from lyapcuda.running_peak import RunningPeak
from lyapcuda.tracker import CurvatureTracker

__all__ = ["BOUND", "BUFFER", "LyapunovSGD"]

#: The bound of 1/h in the groups, by a name that no scheduler writes: "max_lr" is OneCycleLR's too.
BOUND = "max_inverse_h"

#: A parameter's momentum in the optimizer's state, as torch.optim.SGD names it.
BUFFER = "momentum_buffer"

#: Entries of a state_dict beside torch.optim's.
_OWN_STATE = ("tracker", "warm", "lr", "peak")

#: Estimates whose rate is the paper's: of an exponential moving average, without momentum.
_OF_THE_PAPER = ("growth", "paper")


class LyapunovSGD(Optimizer):
    """SGD with momentum whose learning rate is gain/h, h the recent largest curvature.

    It is the paper's quasi-Newton method (§3.1) made robust. h is a `RunningPeak` of ‖y‖/‖q‖, a
    lower bound of the Hessian's norm that costs nothing beside h0: it rises at once and falls
    slowly, so the rate never leaps. Where nothing above 0 is measured the rate stays what it was.
    ``estimate="paper"`` is the method as printed: θ ← θ − (gain/h0)·g.

    With k > 1 (the paper's "more sophisticated" variant) the step is gain/|h_i| along each of the k
    leading eigenvectors, and gain/(|h_(k−1)| + its residual), longer than gain/h0, everywhere else.

    One step costs k + 1 gradients: the training gradient and those of the k copies beside it. The
    first step warms up: it measures at the initial θ, without training. docs/optimizer.md has the
    bounds of stability, and recipes for clipping, accumulation, GradScaler and schedulers.

    Args:
        params: tensors, (name, tensor) pairs, or groups; a group may set ``gain`` (or ``lr``),
            ``max_lr``, ``weight_decay``, ``momentum``, ``nesterov`` and ``capturable`` of its own.
            Frozen ones don't move, and are measured from the step on at which they are thawed.
        gain: learning rate times curvature; in the groups as "lr", which the schedulers of
            torch.optim.lr_scheduler act on. The iteration is stable below 2; with momentum m below
            2·(1 + m), with Nesterov's 2·(1 + m)/(1 + 2m). Or a tensor of one element, on the
            device. None: 1.5 with momentum, and 1 without, with Nesterov's, where k or every is
            above 1, and for the paper's rate.
        lr: another name of gain.
        k: how many leading curvatures, 1 to 32.
        every: measure at every n-th step only; the steps between cost one gradient, and use the
            last curvatures.
        momentum: m of torch.optim.SGD: the step goes along b ← m·b + g. b is kept in float32 for
            16-bit parameters. A gain of 1 then moves as far as 1/(1 − m) without. None: 0.9, and
            0 for the paper's rate.
        nesterov: go along g + m·b.
        weight_decay: adds ½·wd·‖θ‖² to the loss: to the gradient and to the curvature.
        max_lr: bound of 1/h, so of the learning rate at gain 1; also what stands in for 1/h until a
            curvature above 0 was measured, and for the paper's rate wherever h is zero or negative.
            (OneCycleLR writes its own "max_lr" into the groups; the bound is then kept as
            "max_inverse_h".)
        capturable: keeps "lr" as a float64 tensor on the device, so that a step captured in a CUDA
            graph follows a scheduler. No step waits for the device in either case; warm up before
            the capture.
        warmup_tol: h0 is stable, and the warm-up over, when it changed by less than this (relative)
            three times in a row.
        warmup_iterations: at most so many measurements; 0 for no warm-up, and then only max_lr
            bounds the first steps. None: 10, and 100 for the paper's rate, which needs h0.
        estimate: see `CurvatureTracker`. None is "secant", ‖y‖/‖q‖. k > 1 needs one that is read
            off the quotients, which alone give eigenvectors. There a peak remembers what a vector
            had of larger eigenvalues before it converged: longer steps, where few eigenvalues are
            large, by "rayleigh". "growth" and "paper", the inversion (e^λ − 1)/β and Algorithm 1 as
            printed, take the paper's rate: of the average `CurvatureTracker.h_ema`.
        decay: of the peak, a measurement, in (0, 1).
        perturbation, ema, seed, debug: see `CurvatureTracker`.

    Raises:
        TypeError, ValueError: naming the argument and its value.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = LyapunovSGD([theta], gain=1.0, momentum=0.0)
        >>> for _ in range(20):
        ...     loss = optimizer.step(lambda: theta[0].square() + 4.0 * theta[1].square())
        >>> round(float(optimizer.lr), 3)  # 1/h0
        0.125
    """

    # torch.amp.GradScaler.step then leaves `found_inf` here, instead of waiting for the device.
    _step_supports_amp_scaling = True
    # ``CurvatureTracker(optimizer)`` then counts weight_decay as part of the loss, as here.
    _decays_the_loss = True

    def __init__(
        self,
        params: Parameters,
        gain: float | Tensor | None = None,
        *,
        lr: float | Tensor | None = None,
        k: int = 1,
        every: int = 1,
        momentum: float | None = None,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        max_lr: float = 10.0,
        capturable: bool = False,
        perturbation: float | None = None,
        estimate: str | None = None,
        decay: float = 0.995,
        ema: float = 0.9,
        warmup_tol: float = 2e-2,
        warmup_iterations: int | None = None,
        seed: int = 0,
        debug: bool | None = None,
    ) -> None:
        if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
            raise TypeError(
                f"params={described(params)}: expected tensors or groups, as for torch.optim; "
                "pass model.parameters()"
            )
        require_iterable(params)
        if warmup_tol is None:
            raise ValueError("warmup_tol=None: expected a positive finite number")
        positive("warmup_tol", warmup_tol)
        whole("k", k)
        if k > ops.MAX_K:
            raise ValueError(f"k={k}: expected at most {ops.MAX_K}")
        whole("every", every)
        proper_fraction("decay", decay)
        if estimate is None:
            estimate = "secant"
        choice("estimate", estimate, ops.OF_QUOTIENTS if k > 1 else (AUTO, *ops.ESTIMATES))
        papers = estimate in _OF_THE_PAPER
        if momentum is None:
            momentum = 0.0 if papers else 0.9
        fraction("momentum", momentum)
        if warmup_iterations is None:
            warmup_iterations = 100 if papers else 10
        whole("warmup_iterations", warmup_iterations, 0)
        if gain is not None and lr is not None:
            raise ValueError("gain and lr: expected one of them, they are the same; got both")
        self._called = "gain" if lr is None else "lr"  # in messages
        gain = lr if gain is None else gain
        if gain is None:
            fresh = k == every == 1 and not papers
            gain = 1.5 if fresh and momentum and not nesterov else 1.0
        defaults = {
            "lr": gain,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_lr": max_lr,
            "capturable": capturable,
        }
        self._tracker_options = dict(
            k=k,
            every=every,
            perturbation=perturbation,
            estimate=estimate,
            ema=ema,
            seed=seed,
            debug=debug,
        )
        self._decay = decay
        self._warmup_tol, self._warmup_iterations = warmup_tol, warmup_iterations
        self._warm = warmup_iterations == 0
        self._measured = False  # the gradients in .grad are those h was measured with
        self._scaled = False  # ... and a GradScaler's scale was taken out of them
        self._fresh, self._other = True, False
        self._rates: Tensor | None = None
        self._tracker: CurvatureTracker | None = None  # None while all parameters are frozen
        self._peak: RunningPeak | None = None  # of |h|; None where the rate is the paper's
        self._descent = _Descent()
        self._made = False
        super().__init__(params, defaults)
        self._made = True
        self._follow_groups()

    # --- groups ----------------------------------------------------------------------------------

    @property
    def tracker(self) -> CurvatureTracker:
        """What measures the curvature: one and the same object, whatever is added or loaded.

        Raises:
            ValueError: none of the parameters requires a gradient yet.
        """
        if self._tracker is None:
            self._measure_anew()
        return self._tracker

    def _new_tracker(self) -> CurvatureTracker:
        return CurvatureTracker(self.param_groups, **self._tracker_options)

    def _measure_anew(self) -> None:
        """Has the tracker measure what requires a gradient now, from the warm-up on."""
        tracker = self._new_tracker()
        if self._tracker is None:
            self._tracker = tracker
        else:
            self._tracker.become(tracker)
        self._peak = self._new_peak(tracker)
        self._warm = self._warmup_iterations == 0
        self._measured = False
        self._descent = _Descent()

    def _new_peak(self, tracker: CurvatureTracker) -> RunningPeak | None:
        if tracker.estimate in _OF_THE_PAPER:
            return None
        return RunningPeak((tracker.k,), tracker.layout.device, self._decay)

    def _is_behind(self) -> bool:
        """Whether the groups hold other parameters that require a gradient than the tracker, or in
        other places. Those that it has may be frozen meanwhile.
        """
        held: dict[int, int] = {}
        if self._tracker is not None:
            held = {id(p.tensor): p.group for p in self._tracker.layout.parameters}
        return held != {
            id(p): number
            for number, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.requires_grad or id(p) in held
        }

    def _follow_groups(self) -> None:
        """Measures anew where the tracker is behind: parameters were thawed, or groups changed."""
        if self._is_behind():
            self._measure_anew()

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; a group that requires a gradient starts the measurement again, warm-up
        included.
        """
        given = param_group if isinstance(param_group, dict) else {}
        own = [name for name in ("gain", "lr") if name in given]
        super().add_param_group(_gain_as_lr(param_group))
        group = self.param_groups[-1]
        try:
            _keep_bound(group, self.defaults["max_lr"])
            name = own[0] if own else self._called
            _check_group(group, gain=name)
            if not isinstance(group["lr"], Tensor):
                positive(name, group["lr"])
            collect([group], all_frozen=True)
            _gain_to_device(group)
            if self._made:
                self._follow_groups()
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_groups(self) -> None:
        for group in self.param_groups:
            _keep_bound(group, self.defaults["max_lr"])
            _check_group(group)

    # --- reading ---------------------------------------------------------------------------------

    @property
    def rates(self) -> Tensor:
        """The learning rates used last, of the first group that moved (float64 on the device):
        0-dim for k = 1, else (k + 1,): along each eigenvector and, last, off all of them. NaN at
        first.
        """
        if self._rates is None:
            k, some = self._tracker_options["k"], self._tracker
            device = _device_of(self.param_groups[0]) if some is None else some.layout.device
            shape = () if k == 1 else (k + 1,)
            return torch.full(shape, math.nan, dtype=torch.float64, device=device)
        return self._rates

    @property
    def lr(self) -> Tensor:
        """The learning rate used last, of the first group that moved (0-dim float64 on the device);
        for k > 1 that off the eigenvectors.
        """
        rates = self.rates
        return rates if rates.dim() == 0 else rates[-1]

    # --- a step ----------------------------------------------------------------------------------

    @entry_point
    def warmup(self, closures: Closure | Iterable[Closure], *, scaler: Any = None) -> int:
        """Measures at the present θ, without training, until h0 is stable or it has been enough.

        The first `step` or `measure` calls this with its own closure. Leaves no trace but in the
        tracker.

        Args:
            closures: a closure, or an iterable of them, one for each measurement (to average over
                minibatches; each closure is called k + 1 times and has to return the same loss).
            scaler: as for `measure`.

        Returns:
            How many measurements it took. It ends at a loss that isn't finite, and the next `step`
            warms up again. For the paper's rate a UserWarning says when h0 didn't become stable; a
            peak catches up by itself.
        """
        if not callable(closures) and not isinstance(closures, Iterable):
            raise TypeError(
                f"closure={described(closures)}: expected a callable that returns the loss (for "
                "warmup also several)"
            )
        self._follow_groups()
        self._sync_weight_decay()
        source = repeat(closures) if callable(closures) else iter(closures)
        scaler = scaler if _scales(scaler) else AsItIs()
        return self._warm_up(partial(self.tracker.step, c, scaler=scaler) for c in source)

    def _warm_up(self, measurements: Iterable[Callable[[], Any]]) -> int:
        """Takes measurements that leave no trace, until h0 is stable."""
        stable, previous, iterations = 0, math.nan, 0
        every, self.tracker.every = self.tracker.every, 1
        try:
            for measure in islice(measurements, self._warmup_iterations):
                measure()
                if not float(self._accepted()):
                    return iterations
                iterations += 1
                h = float(self.tracker.h.reshape(-1)[0])
                stable = stable + 1 if abs(h - previous) <= self._warmup_tol * abs(h) else 0
                previous = h
                if stable == 3:
                    break
        finally:
            self.tracker.every = every
        if stable < 3 and self._peak is None:
            warnings.warn(
                f"h0 was not stable to {self._warmup_tol:g} after {iterations} iterations of "
                f"warm-up (last: {previous:g}); training starts from there",
                stacklevel=users_level(),
            )
        self.tracker.restart_average()
        if self._peak is not None:
            self._peak.restart()
            self._raise_peak()
        self._warm = True
        return iterations

    def _raise_peak(self) -> None:
        """Takes the curvature of the last measurement into the peak, where that was finite."""
        if self._peak is not None:
            h = ops.state_field(self.tracker.state, self.tracker.k, "h")
            self._peak.update(torch.where(self._accepted() != 0, h.abs(), math.nan))

    @entry_point
    def measure(
        self,
        closure: Callable[..., Tensor | float],
        *,
        part: Closure | None = None,
        batches: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        scaler: Any = None,
    ) -> Tensor:
        """The first half of a step: measures the curvature and leaves the gradient in ``.grad``.

        What is done to ``.grad`` before `step` (clipping) changes the step, not the curvature.
        Gradients that the last step left are replaced. Others, of a ``backward()`` since, are an
        error, unless the closure clears them.

        Args:
            closure: as for `CurvatureTracker.step`, with ``batches`` for each of them.
            part: a closure of a part of the minibatch, to measure the curvature of
                (`CurvatureTracker.step` calls it ``measure``).
            batches: micro-batches: the gradient is that of ``closure(batch)`` over all of them, the
                curvature that of the last.
            sizes: how much each of them counts, as for `CurvatureTracker.step`.
            scaler: a torch.amp.GradScaler. The closure may have called
                ``scaler.scale(loss).backward()`` itself. All gradients are divided by the scale,
                so ``.grad`` is unscaled afterwards, as by ``scaler.unscale_(optimizer)``; go on
                with ``scaler.step(optimizer)`` and ``scaler.update()``.

        Returns:
            The loss, detached.

        Raises:
            RuntimeError: gradients were accumulated since the last step, and the closure doesn't
                clear them; the scale changed between two gradients, or the scaler wasn't updated
                since the last step.
            ValueError: a group's setting; none of the parameters requires a gradient.
        """
        if closure is None:
            raise TypeError("closure=None: LyapunovSGD needs a closure that returns the loss")
        self._check_groups()
        self._follow_groups()
        parameters, given = self.tracker.parameters, closure
        closure = guarded(closure, parameters, self.tracker.layout.ranks)
        try:
            loss = self._measure(closure, part, batches, sizes, scaler)
        except BaseException:
            if closure is given:  # put back; in the buckets of DDP they have been written meanwhile
                note(parameters)
            raise
        note(parameters)
        return loss

    def _measure(
        self,
        closure: Closure,
        part: Closure | None,
        batches: Iterable[Any] | None,
        sizes: Sizes | None,
        scaler: Any,
    ) -> Tensor:
        micro = None if batches is None else list(batches)
        self._sync_weight_decay()
        if not self._warm and micro is None:
            self.warmup(part or closure, scaler=scaler)
        elif not self._warm:
            told = scaler if _scales(scaler) else AsItIs()
            of_last = partial(self.tracker.step_of_last, closure, micro, sizes, told)
            self._warm_up(repeat(of_last))
        scaling = self._scaling(scaler)
        self._measured = False
        fresh = self.tracker.due
        loss = self.tracker.step(
            closure, measure=part, batches=micro, sizes=sizes, leave_grad=True, scaler=scaling
        )
        if isinstance(scaling, Unscaled):
            scaling.finish_()
        if fresh:
            self._raise_peak()
        # Whether the measurement was finite doesn't tell about other gradients than its own.
        self._fresh, self._other = fresh, part is not None or micro is not None
        self._measured, self._scaled = True, isinstance(scaling, Unscaled)
        return loss

    @entry_point
    def step(
        self,
        closure: Callable[..., Tensor | float] | None = None,
        *,
        part: Closure | None = None,
        batches: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor | None:
        """Measures the curvature and steps with gain/h; without a closure, as `measure` found it.

        Args:
            closure, part, batches, sizes: as for `measure`.

        Returns:
            The loss before the step, detached (None without a closure); ``.grad`` holds its
            gradient. Where the loss or a gradient isn't finite, no parameter changes.

        Raises:
            RuntimeError: no closure, and nothing was measured since the last step; the gradients
                are a GradScaler's, which `measure` wasn't told of; or a CUDA graph is being
                captured, and a group isn't ``capturable``.
        """
        if capturing() and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "step() inside the capture of a CUDA graph, but a group has capturable=False: the "
                "graph would keep the learning rate of now; make it LyapunovSGD(capturable=True)"
            )
        overflow = getattr(self, "found_inf", None)
        if closure is None and not self._measured:
            raise RuntimeError(
                "step() without a closure: call measure(closure) before every step(), or "
                "step(closure)"
            )
        if overflow is not None and (closure is not None or not self._scaled):
            raise RuntimeError(
                "scaler.step(optimizer): the curvature was measured with scaled gradients; call "
                "optimizer.measure(closure, scaler=scaler) before it"
            )
        loss = None
        if closure is not None:
            loss = self.measure(closure, part=part, batches=batches, sizes=sizes)
        else:
            self._check_groups()
        self._descend(overflow)
        note(self.tracker.parameters)  # clipped meanwhile
        self._measured = False
        return loss

    def _scaling(self, scaler: Any) -> Unscaled | AsItIs:
        if not _scales(scaler):
            return AsItIs()
        return Unscaled(scaler, self.tracker.parameters, self.tracker.layout.ranks, self)

    def _sync_weight_decay(self) -> None:
        for part in self.tracker.layout.groups:
            part.weight_decay = float(self.param_groups[part.number]["weight_decay"])

    def _accepted(self, state: Tensor | None = None) -> Tensor:
        """A view of one field of the state."""
        state = self.tracker.state if state is None else state
        return ops.state_field(state, self.tracker.k, "accepted")

    @torch.no_grad()
    def _descend(self, overflow: Tensor | None) -> None:
        state = self.tracker.state
        if not self._fresh or self._other:
            device = state.device
            gradients = [p.grad for p in self.tracker.parameters if p.grad is not None]
            found = found_inf(gradients, device, self.tracker.layout.ranks)
            overflow = found if overflow is None else overflow.to(device) + found
        state = state.clone()
        if not self._fresh:
            self._accepted(state).fill_(1.0)
        if self._peak is not None:
            # Until there has been a curvature, the average: 0, or NaN where nothing was measured.
            h, peak = ops.state_field(state, self.tracker.k, "h_ema"), self._peak.value
            h.copy_(torch.where(peak.isnan(), h, peak))
        rates = self._descent.take(self.tracker, state, self, overflow)
        self._rates = self._rates if rates is None else rates

    # --- saving ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim's own keeps only what it knows.
        ours = guarded(_nothing, self._all_parameters()) is _nothing
        return {**self.__dict__, **super().__getstate__(), "_gradients_are_ours": ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ours = state.pop("_gradients_are_ours", False)
        super().__setstate__(state)
        if ours:  # in a copy they are other tensors
            note(self._all_parameters())
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch.optim's own addition
                    group.setdefault(name, value)  # saved by a version that had no such setting

    def state_dict(self) -> dict[str, Any]:
        """Returns torch.optim's, with the tracker's beside it; tensors are copies."""
        added = self.register_state_dict_post_hook(_add_own_state, prepend=True)
        try:
            return super().state_dict()
        finally:
            added.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved optimizer was; its state stays in the precision it was saved in.

        Raises:
            ValueError: the state of another optimizer, of other parameters, or damaged; nothing has
                changed then.
        """
        saved: dict[str, Any] = {}

        def keep(_: Optimizer, made: dict[str, Any]) -> None:
            require_entries(made, *_OWN_STATE, "state", "param_groups", of="a LyapunovSGD")
            saved.update(made)

        before = self.state, self.param_groups  # torch.optim makes new ones
        hooks = [
            self.register_load_state_dict_pre_hook(keep),  # the last: what the others made of it
            self.register_load_state_dict_post_hook(
                lambda _: self._take_own_state(saved), prepend=True
            ),
        ]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _take_own_state(self, saved: dict[str, Any]) -> None:
        """After the groups and the state were loaded; raises before it changes anything else."""
        self._check_groups()
        # torch.optim cast the state to the parameters' dtype.
        numbers = [i for group in saved["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, self._all_parameters(), strict=True):
            entry = saved["state"].get(i)
            for name, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)
        if saved["tracker"] is not None:
            self._load_tracker(saved["tracker"], saved["peak"])
        elif any(p.requires_grad for p in self._all_parameters()):  # at that time none did
            self._measure_anew()
        for group in self.param_groups:
            _gain_to_device(group)
        self._descent = _Descent()
        # The next step has to measure.
        self._warm, self._measured = bool(saved["warm"]), False
        self._rates = saved["lr"].to(self.rates.device)

    def _load_tracker(self, saved: dict[str, Any], saved_peak: dict[str, Any] | None) -> None:
        """Into the same tracker, which logs may follow; nothing has changed after an error."""
        if not isinstance(saved, dict) or not isinstance(saved.get("sizes"), list):
            raise ValueError("state_dict: tracker isn't the state of a CurvatureTracker")
        mine = [] if self._tracker is None else [self._tracker]
        if not mine or self._is_behind():
            mine = [self._new_tracker(), *mine]
        fitting = [t for t in mine if [list(p.shape) for p in t.parameters] == saved["sizes"]]
        if not fitting:
            raise ValueError(
                f"state_dict: {len(saved['sizes'])} parameters were measured, here they are "
                f"{len(mine[0].parameters)}, or of other shapes\nit is of another model, or others "
                "were frozen: make the optimizer, and load, with the\nsame parameters trainable"
            )
        peak = self._new_peak(fitting[0])
        if peak is not None:
            peak.load_state_dict(saved_peak)
        if fitting[0] is not self._tracker:
            fitting[0].load_state_dict(saved)  # raises what is wrong with it
            self._measure_anew()
        self._tracker.load_state_dict(saved)
        self._peak = peak


def _add_own_state(optimizer: LyapunovSGD, saved: dict[str, Any]) -> dict[str, Any]:
    # Each by itself, not as a view of a buffer that several share.
    state = {i: _copied(entry) for i, entry in saved["state"].items()}
    tracker = None if optimizer._tracker is None else optimizer._tracker.state_dict()
    peak = None if optimizer._peak is None else optimizer._peak.state_dict()
    own = (tracker, optimizer._warm, optimizer.rates.clone(), peak)
    return {**saved, "state": state, **dict(zip(_OWN_STATE, own, strict=True))}


def _nothing() -> float:
    return 0.0


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(held) for name, held in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _scales(scaler: Any) -> bool:
    """Whether a GradScaler was given that does anything."""
    return scaler is not None and scaler.is_enabled()


# --- groups --------------------------------------------------------------------------------------


def _gain_as_lr(group: dict[str, Any]) -> dict[str, Any]:
    """The group with its "gain" as "lr", which is what schedulers act on."""
    if not isinstance(group, dict) or "gain" not in group:
        return group
    if "lr" in group:
        raise ValueError("params: a group with both gain and lr, which are the same")
    return {**{name: v for name, v in group.items() if name != "gain"}, "lr": group["gain"]}


def _keep_bound(group: dict[str, Any], default: float) -> None:
    """Keeps the group's "max_lr" as its `BOUND`, unless it is OneCycleLR's."""
    if not {"min_lr", "initial_lr"} <= set(group):  # which writes these too
        group[BOUND] = group["max_lr"]
    group.setdefault(BOUND, default)


def _check_group(group: dict[str, Any], gain: str = "lr") -> None:
    """Raises a ValueError naming the setting and its value; ``gain``: what "lr" is called there."""
    if "gain" in group:
        raise ValueError('gain: set in a group of the optimizer, which keeps it as "lr"')
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"{gain}: expected a number or a floating tensor of one element, got shape "
                f"{tuple(lr.shape)} {lr.dtype}"
            )
    else:
        if lr is None:
            raise ValueError(f"{gain}=None: expected a positive finite number")
        non_negative(gain, lr)
    if group[BOUND] is None:
        raise ValueError("max_lr=None: expected a positive finite number")
    positive("max_lr", group[BOUND])
    non_negative("weight_decay", group["weight_decay"])
    fraction("momentum", group["momentum"])
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True: needs a momentum above 0")


def _device_of(group: dict[str, Any]) -> torch.device:
    """Where a group's scalars live: that of the first parameter that requires a gradient."""
    parameters = group["params"]
    return next((p for p in parameters if p.requires_grad), parameters[0]).device


def _gain_to_device(group: dict[str, Any]) -> None:
    """Where a group is capturable, a float64 tensor of its own on its device holds its gain."""
    if group["capturable"]:
        # (Of a number alone torch would make a float32.)
        gain = torch.as_tensor(group["lr"], dtype=torch.float64).detach()
        group["lr"] = gain.to(_device_of(group), copy=True)


# --- the step, group by group, on the compiled ops -----------------------------------------------


class _Part:
    """The parameters of a flat group that take part in a step, as the ops take them."""

    def __init__(self, place: int, group: FlatGroup, indices: list[int]) -> None:
        self.place, self.group = place, group
        self.tensors = [group.tensors[i] for i in indices]
        self.offsets = [group.offsets[i] for i in indices]
        self.theta = group.segments_at(indices, self.tensors)
        self.gradients = group.segments_at(indices, [p.grad for p in self.tensors])
        #: What `lyapcuda.ops.slopes_` and `lyapcuda.ops.descend_` take; what the second alone does.
        self.options: dict[str, Any] = {}
        self.rate: dict[str, Any] = {}

    def write_back(self) -> None:
        for tensor, segment in zip(self.tensors, self.theta, strict=True):
            held = local(tensor)
            if segment.data_ptr() != held.data_ptr():  # not dense: it was a copy
                held.copy_(segment.view_as(held))


class _Descent:
    """Steps against the gradients in ``.grad``, at the rates of a tracker's curvatures.

    Holds the flat buffers of the momentum.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, list[Tensor]]] = {}  # by place in the layout

    def take(
        self,
        tracker: CurvatureTracker,
        state: Tensor,
        optimizer: Optimizer,
        overflow: Tensor | None = None,
    ) -> Tensor | None:
        """Takes a step; nothing is read back to the host.

        Args:
            tracker: whose layout and directions are used.
            state: its state, or a copy with other values.
            optimizer: whose groups say how, and whose state gets the `BUFFER` of every parameter
                with momentum.
            overflow: a number above 0 where there must be no step.

        Returns:
            The rates of the first group (see the ops); None where there is no gradient at all.
        """
        parts = []
        for place, group in enumerate(tracker.layout.groups):
            # A parameter frozen since stays.
            indices = [
                i for i, p in enumerate(group.tensors) if p.requires_grad and p.grad is not None
            ]
            if indices:
                group.check()
                parts.append(_Part(place, group, indices))
                self._set_up(parts[-1], optimizer, overflow)
        if not parts:
            return None
        if tracker.k > 1:
            panels = tracker.separations.stepped
            self._add_slopes(parts, state, panels, tracker.layout.ranks)
        rates = []
        for part in parts:
            here = state.to(part.group.device)
            rates.append(
                ops.descend_(part.theta, part.gradients, here, **part.rate, **part.options)
            )
            part.write_back()
        return rates[0]

    def _set_up(self, part: _Part, optimizer: Optimizer, overflow: Tensor | None) -> None:
        device, settings = part.group.device, optimizer.param_groups[part.group.number]
        part.options["weight_decay"] = float(settings["weight_decay"])
        if settings["momentum"]:
            part.options["momentum"] = float(settings["momentum"])
            part.options["nesterov"] = bool(settings["nesterov"])
            part.options["buffer"] = self._buffer(part, optimizer.state)
        lr, factor = settings["lr"], None
        if isinstance(lr, Tensor):
            lr, factor = 1.0, lr.detach().to(device, torch.float64)
        if overflow is not None:
            go = torch.where(overflow.to(device) == 0, 1.0, math.nan).double()
            factor = go if factor is None else factor * go
        if factor is not None:
            part.options["factor"] = factor.reshape(1)
        part.rate = {"gain": float(lr), "max_lr": float(settings[BOUND])}
        if settings["momentum"]:
            part.rate["offsets"] = part.offsets

    def _buffer(self, part: _Part, state: MutableMapping[Tensor, dict[str, Any]]) -> Tensor:
        """The flat buffer whose views are the parameters' momentum."""
        group = part.group
        if part.place not in self._buffers:
            flat = group.new_buffer()
            views = zip(group.views(flat), group.tensors, strict=True)
            self._buffers[part.place] = flat, [whole_tensor(view, like) for view, like in views]
        flat, views = self._buffers[part.place]
        for p, view in zip(group.tensors, views, strict=True):
            held = state[p].get(BUFFER)
            if held is view:
                continue
            if held is not None and local(held).data_ptr() != local(view).data_ptr():
                local(view).copy_(local(held))  # loaded, or of another layout
            state[p][BUFFER] = view
        return flat

    def _add_slopes(
        self, parts: list[_Part], state: Tensor, panels: list[Tensor], ranks: Ranks | None
    ) -> None:
        """Has every part step along the tracked eigenvectors too, each at its own rate."""
        slopes = 0.0
        for part in parts:
            here, panel = state.to(part.group.device), panels[part.place]
            call = (part.theta, part.gradients, part.offsets, panel, here)
            slopes = slopes + ops.slopes_(*call, **part.options).to(state.device)
            part.rate.update(panel=panel, offsets=part.offsets)
        slopes = slopes if ranks is None else ranks.sum(slopes)
        for part in parts:
            part.rate["slopes"] = slopes.to(part.group.device)
