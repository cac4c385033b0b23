"""LyapunovSGD: stochastic gradient descent whose learning rate is one over the curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lyapcuda import ops
from lyapcuda.arguments import positive
from lyapcuda.evaluate import Closure
from lyapcuda.flat import FlatLayout, Parameters
from lyapcuda.saved import require_entries
from lyapcuda.tracker import CurvatureTracker

__all__ = ["LyapunovSGD"]


class LyapunovSGD(Optimizer):
    """The paper's quasi-Newton method (§3.1): θ ← θ − (gain/h0)·g, h0 measured at every step.

    One step costs two gradients: the training gradient and that of the second copy. h0 is smoothed
    by an exponential moving average. The first step warms up: it measures at the initial θ, without
    training, until h0 is stable.

    Args:
        params: tensors, (name, tensor) pairs, or groups; a group may set ``gain``, ``max_lr`` and
            ``weight_decay`` of its own.
        gain: learning rate times curvature; the iteration along the leading eigenvector is stable
            below 2.
        weight_decay: adds ½·wd·‖θ‖² to the loss: to the gradient and to the curvature.
        max_lr: bound of the learning rate, which also holds where h0 is zero or negative.
        warmup_tol: h0 is stable when it changed by less than this (relative) three times in a row.
        warmup_iterations: at most so many; 0 for no warm-up, and then only max_lr bounds the first
            steps.
        estimate: see `CurvatureTracker`. The default here is "growth", the exact inversion
            (e^λ − 1)/β: where q is no eigenvector (noise, kinks, the first steps) it lies above the
            Rayleigh quotient, so the steps err on the short side. Measured on the digits runs, the
            Rayleigh quotient made two of six diverge at gain 1, this none.
        perturbation, ema, seed: see `CurvatureTracker`.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        params: Parameters,
        gain: float = 1.0,
        *,
        weight_decay: float = 0.0,
        max_lr: float = 10.0,
        perturbation: float | None = None,
        estimate: str = "growth",
        ema: float = 0.9,
        warmup_tol: float = 2e-2,
        warmup_iterations: int = 100,
        seed: int = 0,
    ) -> None:
        if warmup_tol is None:
            raise ValueError("warmup_tol=None: expected a positive finite number")
        positive("warmup_tol", warmup_tol)
        if not isinstance(warmup_iterations, int) or warmup_iterations < 0:
            raise ValueError(
                f"warmup_iterations={warmup_iterations!r}: expected a whole number of at least 0"
            )
        defaults = {"gain": gain, "max_lr": max_lr, "weight_decay": weight_decay}
        self._tracker_options = dict(
            perturbation=perturbation, estimate=estimate, ema=ema, seed=seed
        )
        self._warmup_tol, self._warmup_iterations = warmup_tol, warmup_iterations
        self._warm = warmup_iterations == 0
        super().__init__(params, defaults)
        self.tracker = self._new_tracker()
        self._lr: Tensor | None = None

    def _new_tracker(self) -> CurvatureTracker:
        return CurvatureTracker(self.param_groups, **self._tracker_options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; after the first group the measurement starts again, warm-up
        included.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            FlatLayout([group])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if hasattr(self, "tracker"):
            self.tracker = self._new_tracker()
            self._warm = self._warmup_iterations == 0

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        for name in ("gain", "max_lr"):
            if group[name] is None:
                raise ValueError(f"{name}=None: expected a positive finite number")
            positive(name, group[name])

    def __getstate__(self) -> dict[str, Any]:
        # torch.optim's own keeps only what it knows: copies and pickles would lack the rest.
        return {**self.__dict__, **super().__getstate__()}

    @property
    def lr(self) -> Tensor:
        """The learning rate used last, of the first group (0-dim float64 on the device)."""
        if self._lr is None:
            return torch.tensor(math.nan, dtype=torch.float64, device=self.tracker.h.device)
        return self._lr

    def warmup(self, closures: Closure | Iterable[Closure]) -> int:
        """Measures at the present θ, without training, until h0 is stable.

        The first `step` calls this with its own closure. Leaves no trace but in the tracker.

        Args:
            closures: a closure, or an iterable of them, one for each measurement (to average over
                minibatches; each closure is called twice and has to return the same loss).

        Returns:
            How many measurements it took. A UserWarning says when h0 didn't become stable. It ends
            at a loss that isn't finite, and the next `step` warms up again.
        """
        source = repeat(closures) if callable(closures) else iter(closures)
        stable, previous, iterations = 0, math.nan, 0
        for closure in islice(source, self._warmup_iterations):
            self.tracker.step(closure)
            if not int(self.tracker.state[ops.STATE_FIELDS.index("accepted")]):
                return iterations
            iterations += 1
            h = float(self.tracker.h)
            stable = stable + 1 if abs(h - previous) <= self._warmup_tol * abs(h) else 0
            previous = h
            if stable == 3:
                break
        if stable < 3:
            warnings.warn(
                f"h0 was not stable to {self._warmup_tol:g} after {iterations} iterations of "
                f"warm-up (last: {previous:g}); training starts from there",
                stacklevel=2,
            )
        self.tracker.restart_average()
        self._warm = True
        return iterations

    def step(self, closure: Closure) -> Tensor:
        """Measures h0 and steps with gain/h0.

        Args:
            closure: as for `CurvatureTracker.step`.

        Returns:
            The loss before the step, detached; ``.grad`` holds its gradient. Where the loss or a
            gradient isn't finite, no parameter changes.
        """
        if closure is None:
            raise TypeError("closure=None: LyapunovSGD.step needs a closure that returns the loss")
        for group in self.param_groups:
            self._check_group(group)
        if not self._warm:
            self.warmup(closure)
        loss = self.tracker.step(closure, leave_grad=True)
        self._descend()
        return loss

    @torch.no_grad()
    def _descend(self) -> None:
        rates, measured = [], {id(p) for p in self.tracker.parameters}
        for group in self.param_groups:
            # Only what is measured: a parameter unfrozen since isn't in h0 yet.
            members = [
                p
                for p in group["params"]
                if p.requires_grad and p.grad is not None and id(p) in measured
            ]
            for part in FlatLayout([{"params": members}]).groups if members else ():
                theta = part.segments(part.tensors)
                state = self.tracker.state.to(part.device)
                rates.append(
                    ops.descend_(
                        theta,
                        part.segments([p.grad for p in part.tensors]),
                        state,
                        gain=group["gain"],
                        max_lr=group["max_lr"],
                        weight_decay=group["weight_decay"],
                    )
                )
                for tensor, segment in zip(part.tensors, theta, strict=True):
                    if segment.data_ptr() != tensor.data_ptr():  # not dense: it was a copy
                        tensor.copy_(segment.view_as(tensor))
        if rates:
            self._lr = rates[0]

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, with the tracker's state beside it (kept in full precision)."""
        saved = super().state_dict()
        saved["tracker"] = self.tracker.state_dict()
        saved["warm"] = self._warm
        saved["lr"] = self.lr.clone()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved optimizer was; a mismatch is a ValueError, and changes
        nothing.
        """
        require_entries(state_dict, "tracker", "warm", "lr", of="a LyapunovSGD")
        before = super().state_dict()
        own = {name: state_dict[name] for name in ("state", "param_groups")}
        super().load_state_dict(own)
        try:
            tracker = self._new_tracker()  # the groups' weight decay may be another now
            tracker.load_state_dict(state_dict["tracker"])
        except BaseException:
            super().load_state_dict(before)
            raise
        self.tracker = tracker
        self._warm = bool(state_dict["warm"])
        self._lr = state_dict["lr"].to(tracker.h)
