"""CurvatureTracker: the leading curvature of any training run, from two gradients a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lyapcuda import ops
from lyapcuda.evaluate import (
    Closure,
    at_a_copy,
    gradient_pair,
    modules_of,
    plain_gradient,
)
from lyapcuda.flat import FlatLayout, Parameters
from lyapcuda.lyapunov import SIGNS, Separation

__all__ = ["CurvatureTracker"]

_STATE_FORMAT = 1


class CurvatureTracker:
    """Follows the largest (or smallest) eigenvalue of the loss's Hessian while something trains.

    A separation q is carried from step to step; each `step` evaluates the closure's gradient at θ
    and at θ + q on the same minibatch (same random numbers, same buffers) and lets both copies
    climb (Algorithm 1 of the paper; for ``which="SA"`` descend, App. A). How fast they part is the
    Lyapunov exponent, and the difference of the gradients the curvature. Everything stays on the
    device until read: `h`, `interval` and the rest are device tensors.

    Args:
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²), as in torch.optim.SGD.
        k: how many eigenvalues. Only 1 so far.
        every: measure at every n-th `step` only.
        perturbation: Δq, the norm of q. None chooses it from the parameters' size and precision
            (`lyapcuda.lyapunov.default_perturbation`); the paper's is 5e-2.
        which: "LA", the largest (algebraic) eigenvalue h0, or "SA", the smallest, hN.
        estimate: what `h` is. "rayleigh": the Rayleigh quotient q·y/‖q‖², y = g(θ + q) − g(θ),
            unbiased and signed; the mean of the last two, which look from opposite sides of θ.
            "growth": the exact inversion (e^λ − 1)/β of the growth. "paper": Algorithm 1 as printed
            (β starts at 1, β ← β/λ, h = 1/β), which converges to h0/(e − 1); as printed, a single
            λ < 0 turns β negative and the map around, which `rayleigh` then shows.
        beta: a fixed ascent rate (the learning rate of the map, for "SA" its α) instead of one that
            follows the curvature.
        momentum: m of the heavy-ball map (App. B), 0 for none; needs one more N-float buffer.
        weight_decay: for parameters whose group names none.
        ema: weight of the past in `h_ema`, in [0, 1).
        seed: of the random first q; the global random states are not touched.
        model: the module or modules whose buffers, and whose other parameters' gradients, are put
            back between evaluations. Without it: every module that holds a tracked parameter, with
            its children. Give it where the closure runs modules beside those.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        params: Parameters,
        k: int = 1,
        every: int = 1,
        perturbation: float | None = None,
        *,
        which: str = "LA",
        estimate: str = "rayleigh",
        beta: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ema: float = 0.9,
        seed: int = 0,
        model: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        _positive("perturbation", perturbation)
        _positive("beta", beta)
        _choice("which", which, SIGNS)
        _choice("estimate", estimate, ops.ESTIMATES)
        _fraction("momentum", momentum)
        _fraction("ema", ema)
        _whole("every", every)
        _whole("k", k)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r}: expected a whole number in 0..2**63-1")
        models = () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)
        for module in models:
            if not isinstance(module, nn.Module):
                raise TypeError(f"model={type(module).__name__}: expected torch.nn.Module")
        self._layout = FlatLayout(params, weight_decay)
        if k > self._layout.numel:
            raise ValueError(f"k={k}: there are only {self._layout.numel} parameters")
        if k > 1:
            raise ValueError(f"k={k}: this version tracks one eigenvalue, k=1")
        self.k, self.every, self.which, self.estimate = k, every, which, estimate
        self._perturbation = perturbation
        self._options = dict(beta=beta, momentum=momentum, ema=ema, seed=seed)
        self._models = models
        self._beside: list[Tensor] = []  # other parameters of the optimizers we are attached to
        self._modules: list[nn.Module] | None = None
        self._separation: Separation | None = None
        self._calls = 0

    # --- measuring -------------------------------------------------------------------------------

    def step(self, closure: Closure, *, leave_grad: bool = False) -> Tensor | None:
        """Measures once on the minibatch that the closure holds.

        Args:
            closure: takes nothing and returns the loss; may have called ``backward()`` itself, or
                leave that to us. Called twice: its random numbers are replayed.
            leave_grad: False leaves no trace: parameters, their ``.grad``, buffers and random
                states are bitwise what they were. True leaves what one plain evaluation at θ with
                cleared gradients leaves: an optimizer's ``step()`` can follow, and the measurement
                has cost one gradient more, not two. A gradient that was there before is replaced,
                not added to: accumulate inside the closure.

        Returns:
            The loss at θ, detached. None when ``every`` skips this step (with ``leave_grad`` the
            gradient at θ is evaluated all the same).

        A loss or gradient that isn't finite leaves `h` and all of the state as they were and adds
        to `skipped`. After an exception of the closure everything is as it was.
        """
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: expected a callable that returns the loss")
        parameters = [p.tensor for p in self._layout.parameters]
        names = [p.name for p in self._layout.parameters]
        if self._calls % self.every:
            loss = plain_gradient(closure, parameters, names=names) if leave_grad else None
            self._calls += 1
            return loss
        separation = self._started()
        copies = separation.place()
        try:
            pair = gradient_pair(
                closure,
                parameters,
                copies,
                names=names,
                modules=self._modules,
                leave=leave_grad,
            )
        except BaseException:
            separation.withdraw()
            raise
        separation.advance(pair)
        self._calls += 1
        return pair.loss0

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Measures inside every ``optimizer.step(closure)`` from now on, at one gradient more.

        ``.grad`` is then that of the closure alone, as ``leave_grad`` leaves it.
        Returns a handle; ``handle.remove()`` ends it. ``optimizer.step()`` without a closure raises
        a ValueError: there is nothing to evaluate the second copy with.
        """

        self._beside += [p for group in optimizer.param_groups for p in group["params"]]
        self._modules = None

        def measure_first(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                raise ValueError(
                    "optimizer.step() was called without a closure: an attached CurvatureTracker "
                    "needs optimizer.step(closure); or call tracker.step(closure) yourself"
                )
            measured = False

            def measured_closure() -> Tensor | float:
                nonlocal measured
                # A line search evaluates again, another tracker's copy elsewhere: not for us.
                if measured or at_a_copy():
                    return closure()
                measured = True
                return self.step(closure, leave_grad=True)

            # Hooks see the optimizer as args[0].
            others = {name: value for name, value in kwargs.items() if name != "closure"}
            return (optimizer, measured_closure, *args[2:]), others

        return optimizer.register_step_pre_hook(measure_first)

    def _started(self) -> Separation:
        if self._modules is None:
            self._modules = (
                [m for model in self._models for m in model.modules()]
                if self._models
                else modules_of([*(p.tensor for p in self._layout.parameters), *self._beside])
            )
        if self._separation is None:
            self._separation = Separation(
                self._layout,
                sign=SIGNS[self.which],
                estimate=self.estimate,
                perturbation=self._perturbation,
                **self._options,
            )
        return self._separation

    @property
    def parameters(self) -> list[Tensor]:
        """The tracked tensors, in the user's order."""
        return [p.tensor for p in self._layout.parameters]

    @property
    def state(self) -> Tensor:
        """The scalars as one device vector, fields `lyapcuda.ops.STATE_FIELDS` (a live view)."""
        return self._started().state

    def restart_average(self) -> None:
        """Lets `h_ema` begin anew at the present `h`."""
        state = self._started().state
        fields = ops.STATE_FIELDS
        state[fields.index("h_ema")] = state[fields.index("h")]

    # --- reading ---------------------------------------------------------------------------------

    def _value(self, name: str) -> Tensor:
        if self._separation is None:
            unmeasured = 0.0 if name in ("steps", "skipped") else math.nan
            return torch.tensor(unmeasured, dtype=torch.float64, device=self._layout.device)
        return self._separation.value(name)

    @property
    def h(self) -> Tensor:
        """The eigenvalue, by the chosen estimate (0-dim float64 on the device; NaN at first)."""
        return self._value("h")

    @property
    def h_ema(self) -> Tensor:
        """Exponential moving average of `h`."""
        return self._value("h_ema")

    @property
    def rayleigh(self) -> Tensor:
        """ρ = q·y/‖q‖², whatever the estimate."""
        return self._value("rayleigh")

    @property
    def residual(self) -> Tensor:
        """r = ‖y − ρq‖/‖q‖: some eigenvalue of the symmetric map q → y lies in [ρ − r, ρ + r]."""
        return self._value("residual")

    @property
    def interval(self) -> Tensor:
        """(2,) float64: some eigenvalue lies within, up to second order in Δq.

        Its middle is the mean of the last two Rayleigh quotients (with ``estimate="paper"``, the
        last), which look from opposite sides of θ; half its length is the mean of their residuals
        plus half their difference. On a changing minibatch that holds the change as well.
        """
        center, width = self._value("center"), self._value("width")
        return torch.stack([center - width, center + width])

    @property
    def exponent(self) -> Tensor:
        """λ = log(‖d‖/‖q‖), the Lyapunov exponent of the last step."""
        return self._value("exponent")

    @property
    def beta(self) -> Tensor:
        """The ascent rate (for "SA" the descent rate) of the next step."""
        return self._value("beta")

    @property
    def steps(self) -> Tensor:
        """How many measurements were taken (0-dim float64)."""
        return self._value("steps")

    @property
    def skipped(self) -> Tensor:
        """How many were left out because a loss or gradient wasn't finite."""
        return self._value("skipped")

    @property
    def perturbation(self) -> float | None:
        """Δq: as given, or as chosen at the first step (None before)."""
        if self._separation is None:
            return self._perturbation
        return float(self._separation.value("perturbation"))

    def vector(self) -> list[Tensor]:
        """q, the separation: shaped like the parameters, in their order; of norm Δq.

        Raises RuntimeError before the first step.
        """
        if self._separation is None:
            raise RuntimeError("vector(): nothing was measured yet")
        return self._separation.vector()

    # --- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; loads with
        ``torch.load(weights_only=True)``.
        """
        return {
            "format": _STATE_FORMAT,
            "k": self.k,
            "which": self.which,
            "estimate": self.estimate,
            "sizes": [list(p.tensor.shape) for p in self._layout.parameters],
            "calls": self._calls,
            "separation": None if self._separation is None else self._separation.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved tracker was.

        Raises:
            ValueError: it isn't a tracker's, or is of other parameters, another k, ``which`` or
                ``estimate``; nothing has changed then.
        """
        if not isinstance(state_dict, dict) or state_dict.get("format") != _STATE_FORMAT:
            raise ValueError("state_dict: not the state of a CurvatureTracker of this version")
        mine = self.state_dict()
        for name in ("k", "which", "estimate", "sizes"):
            if state_dict.get(name) != mine[name]:
                raise ValueError(
                    f"state_dict: {name} is {state_dict.get(name)!r}, but this tracker's is "
                    f"{mine[name]!r}"
                )
        missing = {"calls", "separation"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict: incomplete, it lacks {sorted(missing)}")
        saved = state_dict["separation"]
        if saved is None:
            self._separation = None
        else:
            self._started().load_state_dict(saved)
        self._calls = int(state_dict["calls"])


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _positive(name: str, value: Any) -> None:
    if value is None:
        return
    if not _is_real(value) or not (0 < value < math.inf):
        raise ValueError(f"{name}={value!r}: expected a positive finite number")


def _fraction(name: str, value: Any) -> None:
    if not _is_real(value) or not (0 <= value < 1):
        raise ValueError(f"{name}={value!r}: expected a number in [0, 1)")


def _whole(name: str, value: Any) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def _choice(name: str, value: Any, choices: dict[str, int]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
