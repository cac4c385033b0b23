"""CurvatureTracker: the leading curvatures of any training run, from k + 1 gradients a step."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lyapcuda import ops
from lyapcuda.arguments import (
    choice,
    described,
    fraction,
    positive,
    proper_fraction,
    users_level,
    whole,
)
from lyapcuda.arguments import seed as check_seed
from lyapcuda.dynamics.options import AUTO, GrowthOptions, Tolerance
from lyapcuda.dynamics.refinement import check_room
from lyapcuda.dynamics.separations import (
    ENDS,
    Separations,
    ends_of,
    per_value,
    schwarz_quotient,
)
from lyapcuda.dynamics.sizing import Sizing
from lyapcuda.history import CurvatureHistory, Ring
from lyapcuda.objective.attached import StepHook
from lyapcuda.objective.batch_weights import BatchWeights, Sizes
from lyapcuda.objective.entry import entry_point
from lyapcuda.objective.evaluator import (
    OWN,
    Add,
    Closure,
    Evaluator,
    Further,
    Gradients,
    NoGradient,
    Probe,
)
from lyapcuda.objective.exact_products import ONE_PROCESS, ExactEvaluator
from lyapcuda.objective.first_evaluation import Touched
from lyapcuda.objective.grad_scaler import Unscaled
from lyapcuda.objective.interrupts import StepLock, allowed, deferred
from lyapcuda.objective.isolation import (
    LooseParameters,
    Snapshot,
    TrackedGradients,
    chosen_modules,
    modules_of,
)
from lyapcuda.objective.loss_graph import watching
from lyapcuda.objective.loss_multiple import AsItIs
from lyapcuda.objective.micro_batches import Measured, MicroBatches, accumulated, beside
from lyapcuda.params.collect import Parameters
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.ranks import RankError, Ranks, is_wrapper
from lyapcuda.params.saved_state import require_entries
from lyapcuda.params.shards import compute_epsilon
from lyapcuda.params.wrapped_optimizers import attachable
from lyapcuda.stability.alarm import EdgeAlarm
from lyapcuda.stability.metric import Metric, Source
from lyapcuda.stability.rules import known_rule

__all__ = ["MODES", "CurvatureTracker"]

#: How the curvature along q is found.
MODES = ("difference", "exact")

_FORMAT = 9


@dataclass(frozen=True)
class _Request:
    """What one step is asked for.

    Attributes:
        closure, measure: as of `CurvatureTracker.step`.
        micro: batches, and how much each counts.
        leave: the gradient at θ in ``.grad``.
        add: to what is there, as of `Evaluator.gradients`.
    """

    closure: Closure
    measure: Closure | None
    micro: MicroBatches | None
    leave: bool
    add: Add


class CurvatureTracker:
    """Follows the largest (or smallest) eigenvalues of the loss's Hessian while something trains.

    A separation q is carried from step to step; each `step` evaluates the closure's gradient at θ
    and at θ + q on the same minibatch (same random numbers, same buffers) and lets both copies
    climb (Algorithm 1 of the paper; for ``which="SA"`` descend, App. A). How fast they part is the
    Lyapunov exponent, and the difference of the gradients the curvature. With k > 1 there are k
    copies beside θ, whose separations are kept orthogonal (App. C): k + 1 gradients and two panels
    of k·N floats. Everything stays on the device until read: `h`, `interval` and the rest are
    device tensors. What every eigenvalue has comes with an axis of k, the first; for k = 1 without
    it. The first step only measures, at β = 0, unless β is yours or the paper's.

    Args:
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²), as in torch.optim.SGD. A module
            stands for its named parameters, an optimizer for its groups (a weight decay apart from
            the gradient, as AdamW's, isn't part of the loss).
        k: how many eigenvalues, up to 32 from either end. Values are in the order from the outer
            end inwards, for "BE" from the largest to the smallest.
        every: measure at every n-th `step` only.
        perturbation: Δq, the norm of q. None chooses it from the parameters' size and precision,
            from the second step on also from what autograd's graph shows of the loss. Where that is
            coarse (autocast, TF32) or hidden, from the gradients' rounding noise, which the first
            14 measurements take five gradients more for, every hundredth three. Paper: 5e-2.
        which: "LA", the largest (algebraic) eigenvalues h0, h1, …; "SA", the smallest, hN, …; or
            "BE", both ends at once, half of k at each (one more at the upper end where k is odd).
        estimate: what `h` is. "auto" chooses at the first step: "schwarz" where the loss is seen to
            be smooth, "secant" where it isn't, "outer" for ``which="SA"``. These three are free, of
            the last step alone, and correct the Rayleigh quotient ρ = q·y/‖q‖², y = g(θ + q) − g(θ)
            (for k > 1 the Ritz values), outwards by what its residual r says, for a q that lags
            behind. For 16-bit parameters, whose Δq is too large for one side of θ, "rayleigh".
            "schwarz": y·y/(q·y), half a step nearer to the eigenvector; counts what isn't linear in
            q (kinks) in full. "secant": ‖y‖/‖q‖ with the sign of ρ, halfway there. "outer": the
            outer end of [ρ − r, ρ + r], ρ itself once r is below a tenth of it.
            "rayleigh": the mean of the last two ρ, which look from opposite sides of θ; lags.
            "growth": the exact inversion (e^λ − 1)/β of the growth. "paper": Algorithm 1 as printed
            (β starts at 1, β ← β/λ, h = 1/β), which converges to h0/(e − 1); as printed, a single
            λ < 0 turns β negative and the map around, which `rayleigh` then shows.
        tol: a step takes further gradients of the same minibatch while the residual of a value is
            above tol·|h|, in (0, 1): each brings the largest residual into the span that the values
            are taken from. On smooth losses a fifth step that needs none takes one all the same,
            for the gradient. None: never. One number is read back at every step.
        iterations: the most further gradients in a step. Memory: 2·(k + iterations) N-float buffers
            more, and a copy of the gradient while they are taken.
        beta: a fixed ascent rate (the learning rate of the map, for "SA" its α) instead of one that
            follows the curvature.
        momentum: m of the heavy-ball map (App. B), 0 for none; needs 2k more N-float buffers.
        weight_decay: for parameters whose group names none.
        ema: weight of the past in `h_ema`, in [0, 1).
        history: how many measurements `history` can look back on, kept on the device; 0 for none.
        seed: of the random first q; the global random states are not touched.
        model: modules and tensors whose buffers, and whose gradients, are put back between
            evaluations, beside what these are seen to touch: modules that run, tensors that get a
            gradient, plain attributes that change. Needed only for what runs inside compiled
            functions.
        process_group: the ranks that train one model together. Needed only where gradients are
            averaged by hand: DistributedDataParallel and DTensor parameters (FSDP2) tell. All
            ranks then take every `step` together, see docs/distributed.md.
        optimizer: the one that trains the parameters (`attach` is something else). The eigenvalues
            are then those of P⁻¹H, with its diagonal preconditioner P, read from its state at every
            measurement: Adam, AdamW, NAdam, RMSprop, Adagrad; for SGD P = 1. `edge` says how near
            that is to the optimizer's threshold of stability. Before its first step there is no P:
            `due` is False. Where rates or thresholds differ among its groups, P has them, over the
            first group's. The weight decay of the loss is the optimizer's. Memory: one N-float
            buffer more.
        preconditioned: None: as the optimizer does. False: H itself, whatever the optimizer. A
            function of a parameter that returns its diagonal of P (positive, of its shape), or a
            sequence of these in the parameters' order: any other P.
        mode: "difference": of gradients at θ + q and at θ, which see the loss at the scale Δq.
            "exact": products H·q by double backward, in the graph of the gradient at θ: the Hessian
            at θ itself, of a ReLU net that of its linear piece. The closure is called once, and
            must not call ``backward()``. Δq is then no distance, only the norm of q, 1 by default.
            Refused where double backward fails or is wrong (fused attention, compiled parts,
            weight_norm, DDP, FSDP2, hooks on parameters); see docs/tracking.md for that and for
            what it costs.
        debug: whether closures are checked: that they are the same function twice (not another
            minibatch), and that the loss changes along the gradient as that says (not where ranks
            average gradients). Takes four evaluations more and waits for the device. None: at the
            first measurement. True: at each. False: never.

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
        estimate: str = AUTO,
        tol: float | None = None,
        iterations: int = 2,
        beta: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ema: float = 0.9,
        history: int = 1000,
        seed: int = 0,
        model: nn.Module | Tensor | Iterable[nn.Module | Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
        mode: str = "difference",
        debug: bool | None = None,
        optimizer: Optimizer | None = None,
        preconditioned: bool | Source | None = None,
    ) -> None:
        positive("perturbation", perturbation)
        positive("beta", beta)
        choice("which", which, ENDS)
        choice("estimate", estimate, (AUTO, *ops.ESTIMATES))
        choice("mode", mode, MODES)
        fraction("momentum", momentum)
        fraction("ema", ema)
        whole("every", every)
        whole("k", k)
        whole("history", history, 0)
        check_seed("seed", seed)
        whole("iterations", iterations)
        if tol is not None:
            proper_fraction("tol", tol)
            if estimate == "paper":
                raise ValueError(
                    'tol: Algorithm 1 as printed (estimate="paper") takes one gradient a step; '
                    "choose another estimate"
                )
        self._chosen_modules = chosen_modules(model)
        self._own_modules = list(params.modules()) if isinstance(params, nn.Module) else []
        self._optimizer = None if optimizer is None else attachable(optimizer)
        decays = None
        if self._optimizer is not None and known_rule(self._optimizer) is not None:
            decays = self._optimizer
        self._layout = FlatLayout(params, weight_decay, decays)
        self._given_metric = self._metric_of(preconditioned)
        if process_group is not None and self._layout.sharded:
            raise ValueError(
                f"process_group={described(process_group)}: DTensor parameters have a mesh of "
                "their own"
            )
        for name, value in (("perturbation", perturbation), ("beta", beta)):
            if value is not None and value > self._layout.largest:
                raise ValueError(
                    f"{name}={described(value)}: above {self._layout.largest:.4g}, which q holds"
                )
        self._ends = ends_of(which, k, self._layout.numel)
        self._tensors = [p.tensor for p in self._layout.parameters]
        self.k, self.every, self.which, self.estimate, self.mode = k, every, which, estimate, mode
        exact = mode == "exact"
        if exact and (process_group is not None or self._layout.sharded):
            raise NotImplementedError(ONE_PROCESS)
        tolerance = None if tol is None else Tolerance(tol, iterations)
        if tolerance is not None:
            check_room(self._layout, k, tolerance)
        self.tol, self.iterations = tol, iterations
        self._options = GrowthOptions(
            estimate, perturbation, beta, momentum, ema, seed, tolerance, exact
        )
        if self._given_metric is not None and momentum:
            raise ValueError(
                f"momentum={described(momentum)}: with an optimizer's metric the map has none; the "
                "momentum of the optimizer is in its threshold (tracker.edge)"
            )
        self._gradients = 0
        self._debug, self._process_group = debug, process_group
        self._checked = False
        # All parameters of the optimizers we are attached to, by id.
        self._beside: dict[int, Tensor] = {}
        self._lock = StepLock("tracker.step")
        self._weights = BatchWeights(name="batches")
        self._found_evaluator: Evaluator | None = None
        self._touched = Touched()
        self._separations: Separations | None = None  # made at the first measurement
        self._calls = 0
        self._sizing = self._new_sizing()
        self._history = None
        if history:
            self._history = Ring(history, self._layout.device, self._ends, self.has_edge)
        self._hooks: dict[int, Callable[[CurvatureTracker], None]] = OrderedDict()
        self._load_hooks: dict[int, Callable[[], Callable[[], None]]] = OrderedDict()

    def _metric_of(self, preconditioned: bool | Source | None) -> Metric | None:
        """That of the optimizer, or of what the user gave; None for H itself."""
        optimizer = self._optimizer
        if preconditioned is False or (preconditioned is None and optimizer is None):
            return None
        if preconditioned is True and optimizer is None:
            raise ValueError("preconditioned=True: pass the optimizer, too (optimizer=)")
        if preconditioned is None or preconditioned is True:
            return Metric(self._layout, optimizer)
        return Metric(self._layout, preconditioned, optimizer)

    def __repr__(self) -> str:
        """What it follows, and the last values. Waits for the device."""
        of = "" if self._optimizer is None else f", of {type(self._optimizer).__name__}"
        n, which = self._layout.numel, self.which
        name = f"CurvatureTracker({n:,} parameters, k={self.k}, which={which!r}{of})"
        if self._separations is None:
            return f"{name}: nothing measured yet"
        h, error = self.h.reshape(-1).tolist(), self.h_error.reshape(-1).tolist()
        values = ", ".join(f"{v:.4g} ± {e:.2g}" for v, e in zip(h, error, strict=True))
        edge = f", edge {float(self.edge):.3g}" if self.has_edge else ""
        return f"{name}: h {values}{edge} at step {self._calls}"

    # --- measuring -------------------------------------------------------------------------------

    @entry_point
    def backward(
        self,
        closure: Callable[..., Tensor | float],
        *,
        measure: Closure | None = None,
        batches: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Measures once and adds the gradient at θ to ``.grad``, bit for bit as loss.backward()
        would.

        Everything is what one plain evaluation of the closure leaves. Where gradients are there
        already, and the closure calls ``backward()`` itself without clearing them first, that takes
        one evaluation more.

        Args:
            closure: takes nothing (with ``batches``: a batch) and returns the loss; may have called
                ``backward()`` itself, or leave that to us. Called k + 1 times, with ``tol`` more
                often: its random numbers are replayed.
            measure: another closure, of a part of the minibatch, to measure the curvature of. Costs
                k + 1 gradients of the part more than training alone.
            batches: micro-batches, as of `split_batch`: ``closure(batch)`` is called for each; the
                gradient and the loss are those of all of them together. The curvature is that of
                the last. Costs k gradients of the last more. BatchNorm sees one micro-batch at a
                time, as in gradient accumulation.
            sizes, scaler: as for `step`.

        Returns:
            The loss at θ, detached.

        Raises:
            RuntimeError, TypeError, ValueError: as `step`.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> tracker = CurvatureTracker(model.parameters())
            >>> x, y = torch.ones(8, 3), torch.zeros(8, 1)
            >>> for _ in range(20):
            ...     optimizer.zero_grad()
            ...     loss = tracker.backward(lambda: (model(x) - y).square().mean())
            ...     optimizer.step()
            >>> round(float(tracker.h), 3)  # ‖(1, 1, 1, 1)‖² · 2
            8.0
        """
        micro = self._micro_batches(batches, sizes, measure)
        return self._take_step(closure, measure, micro, scaler, leave=True, add=True)

    @entry_point
    def step(
        self,
        closure: Callable[..., Tensor | float],
        *,
        measure: Closure | None = None,
        batches: Iterable[Any] | None = None,
        sizes: Sizes | None = None,
        leave_grad: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor | None:
        """Measures once on the minibatch that the closure holds.

        Args:
            closure: takes nothing (with ``batches``: a batch) and returns the loss; may have called
                ``backward()`` itself, or leave that to us. Called k + 1 times, with ``tol`` more
                often: its random numbers are replayed.
            measure: another closure, of a part of the minibatch, to measure the curvature of; the
                gradient that ``leave_grad`` leaves is that of ``closure``. Costs k + 1 gradients of
                the part more than training alone.
            batches: micro-batches, as of `split_batch`: ``closure(batch)`` is called for each, and
                the gradient left (and the loss returned) is that of all of them together: the mean,
                weighted by how much each counts, or the sum. The curvature is that of the last; of
                sums, scaled up to all samples. Costs k gradients of the last more. BatchNorm sees
                one micro-batch at a time, as in gradient accumulation.
            sizes: how much each of ``batches`` counts: a number a batch, a function of a batch that
                returns one, or "sum" for losses that are sums. None reads it off the loss (so many
                samples or unpadded tokens as it averages over; sums are added up), or takes the
                lengths of the batches' first tensors where it doesn't show it.
            leave_grad: False leaves no trace: parameters, their ``.grad``, buffers and random
                states are bitwise what they were. True leaves what one plain evaluation at θ with
                cleared gradients leaves: an optimizer's ``step()`` can follow, and the measurement
                has cost one gradient more, not two. A gradient that was there before is replaced,
                not added to: accumulate inside the closure, or over ``batches``; or call
                `backward`.
            scaler: whose ``scaler.scale(loss).backward()`` the closure calls, or leaves to us. The
                curvature is that of the loss itself; the gradient that ``leave_grad`` leaves is
                scaled, as ``scaler.step(optimizer)`` expects it. Memory: one gradient more.

        Returns:
            The loss at θ, detached. None when ``every`` skips this step (with ``leave_grad`` the
            gradient at θ is evaluated all the same).

        A loss or gradient that isn't finite leaves `h` and all of the state as they were and adds
        to `skipped`. After an exception of the closure everything is as it was. Another thread's
        call waits for this one.

        Raises:
            RuntimeError: the closure itself calls `step`, or an optimizer's; it updates the
                parameters, or returns a loss that was computed before; it is another function each
                time, or its gradient isn't that of the loss it returns (see ``debug``).
            TypeError, ValueError: naming the argument; ``measure`` or ``batches`` without
                ``leave_grad`` (pass the part's own closure), or both of them.
        """
        micro = self._micro_batches(batches, sizes, measure, leave_grad)
        return self._take_step(closure, measure, micro, scaler, leave=leave_grad, add=False)

    @entry_point
    def step_of_last(
        self,
        closure: Callable[..., Tensor | float],
        batches: Iterable[Any],
        sizes: Sizes | None = None,
        scaler: Any = None,
    ) -> Tensor | None:
        """Measures the last of ``batches`` as `step` does with them, and leaves no trace.

        Arguments as of `step`. The closure may be evaluated once more, to see whether it is a sum.
        """
        micro = self._micro_batches(batches, sizes)
        last, times = micro.last(self._evaluator, closure)
        return self._take_step(last, None, None, scaler, leave=False, add=False, times=times)

    def _micro_batches(
        self,
        batches: Iterable[Any] | None,
        sizes: Sizes | None,
        measure: Closure | None = None,
        leave: bool = True,
    ) -> MicroBatches | None:
        if (measure is not None or batches is not None) and not leave:
            raise ValueError(
                "leave_grad=False: measure and batches need leave_grad=True; to measure a part and "
                "leave no gradient, pass its closure alone"
            )
        if measure is not None and batches is not None:
            raise ValueError("measure and batches: expected one of them, got both")
        if batches is not None:
            return MicroBatches.of(batches, sizes, self._weights)
        if sizes is not None:
            raise ValueError("sizes: there are no batches to weight; pass them as batches=")
        return None

    def _take_step(
        self,
        closure: Closure,
        measure: Closure | None,
        micro: MicroBatches | None,
        scaler: Any,
        *,
        leave: bool,
        add: Add,
        times: float = 1.0,
    ) -> Tensor | None:
        for name, value in (("closure", closure), ("measure", measure)):
            if not callable(value) and not (name == "measure" and value is None):
                raise TypeError(
                    f"{name}={described(value)}: expected a callable that returns the loss"
                )
        scaling = self._scaling(scaler)
        with deferred(), self._lock:
            add = add if any(p.grad is not None for p in self._tensors) else False
            self._evaluator.scaling, self._evaluator.times = scaling, times
            try:
                return self._measured_step(_Request(closure, measure, micro, leave, add))
            finally:
                self._evaluator.scaling, self._evaluator.times = None, 1.0

    def _scaling(self, scaler: Any) -> Unscaled | AsItIs | None:
        if isinstance(scaler, Unscaled | AsItIs):
            return scaler
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}")
        if scaler is None or not scaler.is_enabled():
            return None
        if self._options.exact:
            raise ValueError(
                "scaler: mode='exact' takes products of the loss itself, unscaled; use "
                "mode='difference' beside a GradScaler"
            )
        return Unscaled(scaler, self._tensors, self._layout.ranks)

    def _measured_step(self, request: _Request) -> Tensor | None:
        """A step inside the lock."""
        if not self.due:
            loss = None
            if request.leave:
                evaluated = self._evaluate(request, [])
                evaluated.leave()
                loss = evaluated.loss
            self._after_gradient()
            return loss
        if self._separations is None:
            self.start()
        else:
            self._refresh()
        before = self._before_exchange(bool(request.add))
        copies = self._separations.place()
        try:
            evaluated, totals = self._advanced(partial(self._evaluate, request), copies)
        except BaseException as error:
            if before is not None and isinstance(error, RankError):
                before.restore()
                before.restore_gradients()
            elif before is not None:
                self._separations.excuse()
            raise
        self._checked = True
        self._resize(totals)
        evaluated.leave()
        self._after_gradient()
        if self._history is not None:
            edge = self.edge if self.has_edge else None
            self._history.record(evaluated.loss, self._separations, edge)
        with allowed():
            for hook in tuple(self._hooks.values()):
                hook(self)
        return evaluated.loss

    def _after_gradient(self) -> None:
        self._calls += 1
        if self._history is not None:
            self._history.tick()

    def _before_exchange(self, values: bool) -> Snapshot | None:
        """What is there before a step that other ranks may still call off; None for one process."""
        if self._layout.ranks is None:
            return None
        self._layout.ranks.check()
        return self._evaluator.snapshot(values=values)

    def _evaluate(
        self, request: _Request, copies: list[list[Tensor]], further: Further | None = None
    ) -> Measured:
        evaluator, closure, add = self._evaluator, request.closure, request.add
        check = bool(copies) and (not self._checked if self._debug is None else self._debug)
        how = {"check": check, "further": further}
        if request.micro is not None:
            kept = TrackedGradients(self._tensors, evaluator.modules) if add is True else None
            measured = accumulated(evaluator, closure, request.micro, copies, **how)
            return measured if kept is None else measured.onto(kept)
        if request.measure is not None and copies:
            return beside(evaluator, request.measure, closure, copies, add=add, **how)
        found = evaluator.gradients(closure, copies, leave=request.leave, add=add, **how)
        return Measured(found, found.loss0, found.leave)

    def _advanced(
        self, evaluate: Callable[..., Measured], copies: list[list[Tensor]]
    ) -> tuple[Measured, Tensor | None]:
        """An evaluation at the separations' copies, and their step; the sums that `Sizing` asks
        for.
        """
        sizing, separations, totals = self._sizing, self._separations, None
        all_copies = [*copies, *sizing.probes(copies)] if sizing.due else copies

        def advance(found: Gradients, probe: Probe | None = None) -> None:
            nonlocal totals
            if sizing.watches:
                separations.suit(sizing.sighting.smooth)
            beside = None
            if sizing.due:
                beside = sizing.sums(found, len(copies), separations.displacement)
            separations.noise = sizing.noise
            totals = separations.advance(found.of(0, len(copies)), beside, probe)

        # Further gradients are of the same function: taken before its states are let go.
        further = advance if separations.refines else None
        with watching(sizing.sighting) if sizing.watches else nullcontext():
            evaluated = evaluate(all_copies, further)
        if further is None:
            advance(evaluated.found)
        self._gradients += len(all_copies) + separations.further
        return evaluated, totals

    def _resize(self, totals: Tensor | None) -> None:
        """After the separations' step: Δq of the next ones, and the noise of this one."""
        if self._sizing.noise or self._sizing.doubt:
            self._separations.widen(self._sizing.noise, self._sizing.doubt)
        if self._sizing.due:
            self._sizing.take(totals, self._separations)
        else:
            self._sizing.skip()

    def _new_sizing(self) -> Sizing:
        options, follows = self._options, self.which != "SA"
        return Sizing(
            self._layout,
            options.perturbation,
            follows,
            options.exact,
            options.one_sided,
            self._metric,
        )

    # --- inside an optimizer ---------------------------------------------------------------------

    def attach(
        self,
        optimizer: Optimizer,
        *,
        measure: Closure | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> RemovableHandle:
        """Measures inside every ``optimizer.step(closure)`` from now on, at k gradients more.

        Args:
            optimizer: any torch.optim.Optimizer, or one in a wrapper of Accelerate's or
                Lightning's. Attached to it again, this takes the place of what was before.
            measure: as in `step`, called at each of them: a closure of a part of the minibatch that
                the optimizer's closure holds then. ``.grad`` is what the optimizer's closure makes
                of it, bit for bit; where it adds to gradients that are there already, that takes
                one evaluation more.
            scaler: as in `step`.

        Returns:
            A handle; ``handle.remove()`` ends it. ``optimizer.step()`` without a closure raises a
            ValueError: there is nothing to evaluate the second copy with.

        What is measured is the first evaluation of the closure within the step. Where the optimizer
        moves θ before that (SAM), a UserWarning says so at the first step, which isn't measured;
        from the next one on the measurement is taken at θ, at k + 1 gradients more.

        Raises:
            TypeError: it is no optimizer, or a wrapper without step hooks: attach to the one
                inside.
        """
        optimizer = attachable(optimizer)
        if measure is not None and not callable(measure):
            raise TypeError(f"measure={described(measure)}: expected a callable, or None")
        hooks = optimizer._optimizer_step_pre_hooks
        for number, hook in tuple(hooks.items()):
            if isinstance(hook, StepHook) and hook.tracker is self:
                del hooks[number]
        return optimizer.register_step_pre_hook(StepHook(self, self._notice, measure, scaler))

    @entry_point
    def step_inside(
        self, closure: Closure, measure: Closure | None, scaler: torch.amp.GradScaler | None
    ) -> Tensor | None:
        """A step inside of an optimizer's: ``.grad`` is what the closure makes of it, and where it
        leaves ``backward()`` to us, its gradient. A closure that gives no gradient at all is
        evaluated as without us, with a UserWarning.
        """
        try:
            return self._take_step(closure, measure, None, scaler, leave=True, add=OWN)
        except NoGradient as error:
            warnings.warn(f"nothing was measured: {error}", stacklevel=users_level())
        return closure()

    def _notice(self, parameters: Iterable[Tensor]) -> None:
        """Takes down whose gradients to put back; groups may be added to an optimizer later."""
        here = {id(p): p for p in parameters}
        if not here.keys() <= self._beside.keys():
            self._beside.update(here)
            self._found_evaluator = None

    def register_step_hook(self, hook: Callable[[CurvatureTracker], None]) -> RemovableHandle:
        """Calls ``hook(tracker)`` after every measurement.

        The step is complete by then, but an exception of the hook's reaches the caller of `step`.

        Returns:
            A handle; ``handle.remove()`` ends it.
        """
        if not callable(hook):
            raise TypeError(f"hook={described(hook)}: expected a function of the tracker")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def on_edge(
        self, callback: Callable[[CurvatureTracker], None], above: float = 1.0
    ) -> RemovableHandle:
        """Calls ``callback(tracker)`` after a measurement at which `edge` rises above a value.

        Called again once the edge has been at or below it in between. One number is read back at
        every measurement.

        Args:
            callback: takes the tracker. It runs before the optimizer's step that follows.
            above: 1 is the edge of stability itself.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            RuntimeError: the tracker has no edge.

        Example:
            >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = torch.optim.SGD([theta], lr=0.3)  # stable up to 2/8
            >>> tracker = CurvatureTracker([theta], optimizer=optimizer)
            >>> warned = []
            >>> handle = tracker.on_edge(lambda tracker: warned.append(tracker.calls))
            >>> for _ in range(9):
            ...     optimizer.zero_grad()
            ...     loss = tracker.backward(lambda: theta[0].square() + 4.0 * theta[1].square())
            ...     optimizer.step()
            >>> len(warned), round(float(tracker.edge), 2)
            (1, 1.2)
        """
        if not callable(callback):
            raise TypeError(f"callback={described(callback)}: expected a function of the tracker")
        if above is None:
            raise ValueError("above=None: expected a positive finite number")
        positive("above", above)
        self.require_edge()
        return self.register_step_hook(EdgeAlarm(callback, above))

    def register_load_hook(self, hook: Callable[[], Callable[[], None]]) -> RemovableHandle:
        """Calls ``hook()`` before `load_state_dict` changes anything, and what that returns after.

        Returns:
            A handle; ``handle.remove()`` ends it.
        """
        handle = RemovableHandle(self._load_hooks)
        self._load_hooks[handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        # A copy isn't what the hooks watch, and its closures are others.
        anew = {"_hooks": OrderedDict(), "_load_hooks": OrderedDict()}
        return {**self.__dict__, **anew, "_found_evaluator": None, "_touched": Touched()}

    def become(self, other: CurvatureTracker) -> None:
        """Measures anew, the parameters of a new tracker of the same options; `calls`, `gradients`,
        `history` and hooks go on.
        """
        kept = {"_calls", "_gradients", "_hooks", "_load_hooks", "_beside", "_lock"}
        if other.layout.device == self._layout.device:
            kept.add("_history")
        with self._lock:
            self.__dict__.update({n: v for n, v in other.__dict__.items() if n not in kept})

    # --- what it works on ------------------------------------------------------------------------

    def start(self) -> None:
        """Makes the separations now rather than at the first measurement.

        A checkpoint of torch.distributed loads into tensors, so they have to be there. Where ranks
        share the parameters, all of them call it.
        """
        if self._separations is not None:
            return
        self._layout.compute_epsilon = compute_epsilon(self._evaluator.modules)
        ranks = self._layout.ranks
        if ranks is not None:
            ranks.agree(self._arguments(), self._layout.device)
        self._refresh()
        separations = Separations(self._layout, self._ends, self._options, self._metric)
        if ranks is not None:
            separations.replicate_(ranks)
        self._separations = separations

    @property
    def _metric(self) -> Metric | None:
        """That in which separations are carried; None where it is the Euclidean one."""
        metric = self._given_metric
        return None if metric is None or metric.trivial else metric

    def _refresh(self) -> None:
        """Takes the optimizer's preconditioner as it is at present."""
        if self._given_metric is None:
            return
        before = self._metric
        self._given_metric.refresh()
        if self._metric is not before and self._separations is not None:  # SGD's rates now differ
            self._sizing, self._separations = self._new_sizing(), None
            self.start()

    @property
    def _evaluator(self) -> Evaluator:
        """Of the tracked parameters and the modules around them, found at the first use."""
        if self._found_evaluator is None:
            modules = [*self._find_modules(), LooseParameters(self._beside.values())]
            names = [p.name for p in self._layout.parameters]
            if self._options.exact:
                self._found_evaluator = ExactEvaluator(self._tensors, names, modules)
            else:
                by_hand = self._process_group is not None
                self._found_evaluator = Evaluator(self._tensors, names, modules, by_hand=by_hand)
            self._found_evaluator.touched = self._touched
        return self._found_evaluator

    def _find_modules(self) -> list[nn.Module]:
        """Those whose buffers are put back; sees to it who shares the parameters."""
        holders = modules_of([*self._tensors, *self._beside.values()])
        if self._layout.ranks is None and not self._layout.sharded:
            self._layout.ranks = Ranks.of_replicas(self._process_group, holders)
        if not self._chosen_modules:
            return list({id(m): m for m in (*holders, *self._own_modules)}.values())
        # DDP and FSDP2 have a say in every evaluation.
        found = self._chosen_modules
        wrappers = [m for m in holders if is_wrapper(m) and all(m is not f for f in found)]
        return [*found, *wrappers]

    def _arguments(self) -> dict[str, float]:
        """What has to be the same on all ranks, as numbers."""
        values = {"numel": self._layout.numel, "k": self.k, "every": self.every}
        values |= {"which": list(ENDS).index(self.which)}
        values |= {"estimate": ops.ESTIMATES.get(self.estimate), "iterations": self.iterations}
        values |= {"tol": self.tol, "preconditioned": self._given_metric is not None}
        names = ("perturbation", "beta", "momentum", "ema", "seed")
        values |= {name: getattr(self._options, name) for name in names}
        return {name: -1.0 if value is None else float(value) for name, value in values.items()}

    @property
    def layout(self) -> FlatLayout:
        """The tracked parameters in groups, as they lie in flat buffers."""
        return self._layout

    @property
    def sizing(self) -> Sizing:
        """What chooses Δq: the gradients' rounding noise, where it was measured."""
        return self._sizing

    @property
    def separations(self) -> Separations:
        """What carries q from step to step."""
        self.start()
        return self._separations

    @property
    def parameters(self) -> list[Tensor]:
        """The tracked tensors, in the user's order."""
        return list(self._tensors)

    @property
    def state(self) -> Tensor:
        """What the steps decide, as one device vector (a live view): the fields are those of
        ``lyapcuda.ops.state_fields(k)``. For "BE" it is the upper end's, of its share of k.
        """
        return self.separations.state

    def restart_average(self) -> None:
        """Lets `h_ema` begin anew at the present `h`."""
        self.separations.restart_average()

    # --- values: copies on the device, which later steps don't change ----------------------------

    def _values(self, name: str) -> Tensor:
        """A value for every eigenvalue: 0-dim for k = 1, else (k,)."""
        if self._separations is None:
            return per_value(self._unmeasured(self.k, math.nan))
        return per_value(self._separations.values(name))

    def _scalar(self, name: str, unmeasured: float = math.nan) -> Tensor:
        """A value for every map: 0-dim, for "BE" (2,), the upper end's and the lower end's."""
        if self._separations is None:
            return per_value(self._unmeasured(len(self._ends), unmeasured))
        return per_value(self._separations.scalars(name))

    def _unmeasured(self, count: int, value: float) -> Tensor:
        return torch.full((count,), value, dtype=torch.float64, device=self._layout.device)

    @property
    def h(self) -> Tensor:
        """The eigenvalues, by the chosen estimate: float64 on the device, 0-dim for k = 1, else
        (k,); NaN at first.
        """
        return self._values("h")

    @property
    def h_ema(self) -> Tensor:
        """Exponential moving average of `h`."""
        return self._values("h_ema")

    @property
    def rayleigh(self) -> Tensor:
        """ρ = q·y/‖q‖² (for k > 1 the Ritz values) of the last step, whatever the estimate."""
        return self._values("rayleigh")

    @property
    def residual(self) -> Tensor:
        """r = ‖y − ρq‖/‖q‖: some eigenvalue of the symmetric map q → y lies in [ρ − r, ρ + r]."""
        return self._values("residual")

    @property
    def schwarz(self) -> Tensor:
        """y·y/(q·y), the Schwarz quotient of the last step (for k > 1 of each Ritz vector).

        It is the Rayleigh quotient half a step on, so nearer to the eigenvalue than ρ where q lags
        behind, and where no eigenvalue is negative never beyond the largest of the minibatch
        measured. Of a small part of a minibatch it is that part's, which is larger than the
        whole's. One-sided: its error is of first order in Δq.
        """
        return schwarz_quotient(self._values("rayleigh"), self._values("residual"))

    @property
    def edge(self) -> Tensor:
        """How near the edge of stability: rate·h/threshold, 1 at the edge; 0-dim float64 on the
        device, NaN at first.

        h is the largest of the eigenvalues, of P⁻¹H, and the rate the optimizer's at present. The
        threshold is that of its update on a quadratic loss: 2 for SGD, 2 + 2m with momentum m, and
        so on (docs/decisions.md). Rates that differ between groups are part of P.

        Raises:
            RuntimeError: the tracker has no edge: it was made without ``optimizer``, say.
        """
        self.require_edge()
        return self.edge_at(self.h.reshape(-1)[0])

    def edge_at(self, h: Tensor) -> Tensor:
        """The `edge` of another largest eigenvalue, a smoothed one say."""
        self.require_edge()
        if self._separations is None:
            return torch.full_like(h, math.nan)
        return self._given_metric.edge_of(h)

    @property
    def has_edge(self) -> bool:
        """Whether there is an `edge`."""
        return self._no_edge() is None

    def require_edge(self) -> None:
        """Raises a RuntimeError that says why there is no `edge`, where there is none."""
        reason = self._no_edge()
        if reason is not None:
            raise RuntimeError(f"edge: {reason}")

    def _no_edge(self) -> str | None:
        """Why there is no `edge`; None where there is one."""
        if self._optimizer is None:
            return "this tracker knows no optimizer; CurvatureTracker(params, optimizer=optimizer)"
        if self.which == "SA":
            return 'which="SA" follows no largest eigenvalue; use "LA" or "BE"'
        if self._given_metric is None:
            return "preconditioned=False measures H itself, not what the optimizer sees of it"
        if not self._given_metric.has_edge:
            return f"the threshold of {described(self._optimizer)} isn't known"
        return None

    @property
    def optimizer(self) -> Optimizer | None:
        """The one whose preconditioner and rates are read, wrappers undone."""
        return self._optimizer

    @property
    def gradient_curvature(self) -> Tensor:
        """g·Hg/‖g‖², the curvature along the gradient g, of the last step; with an optimizer's P
        along P⁻¹g, by uᵀHu/uᵀPu. 0-dim float64. NaN where it would have cost a gradient of its own:
        it is free where ``tol`` took the gradient as a direction.
        """
        value = math.nan if self._separations is None else self._separations.along_gradient
        return torch.tensor(value, dtype=torch.float64, device=self._layout.device)

    @property
    def h_error(self) -> Tensor:
        """What |h − h0| stays below at nine steps in ten, an estimate; shaped like `h`.

        h0 is the eigenvalue at θ of the minibatch's loss that was measured. Of the present step's
        residual, by a formula fitted to 37 training runs: docs/tracking.md has it, and how often it
        holds on others. `interval` says something else: that some eigenvalue, any, lies within.
        """
        return self._values("error")

    @property
    def interval(self) -> Tensor:
        """(2,), for k > 1 (k, 2), float64: some eigenvalue lies within. `h_error` is of h0 itself.

        Its middle is `h` (with "growth" the mean of the last two Rayleigh quotients, with "paper"
        the last), half its length ‖y − hq‖/‖q‖ plus half of what h has changed since the last step:
        up to first order in Δq. With ``estimate="rayleigh"`` up to second order: half its length is
        then the mean of the last two residuals, plus half of what the two quotients differ by. On a
        changing minibatch that holds the change as well.
        """
        center, width = self._values("center"), self._values("width")
        return torch.stack([center - width, center + width], dim=-1)

    @property
    def exponent(self) -> Tensor:
        """λ, the Lyapunov exponents of the last step: log(‖d‖/‖q‖), for k > 1 those of
        Gram–Schmidt, log(R_ii/‖q_i‖). After the first step, which only measures: what they would
        have been at the rate that it found.
        """
        return self._values("exponent")

    @property
    def beta(self) -> Tensor:
        """The ascent rate (for "SA" the descent rate) of the next step; for "BE" both, (2,)."""
        return self._scalar("beta")

    @property
    def steps(self) -> Tensor:
        """How many measurements were taken (0-dim float64; for "BE" (2,), as for `skipped`)."""
        return self._scalar("steps", 0.0)

    @property
    def skipped(self) -> Tensor:
        """How many were left out because a loss or gradient wasn't finite."""
        return self._scalar("skipped", 0.0)

    @property
    def reseeds(self) -> Tensor:
        """How often a separation was lost (it was nothing, or lay in the span of the others, or the
        copies met under a ``beta`` of yours) and another, of random direction, took its place.
        """
        return self._scalar("reseeds", 0.0)

    @property
    def perturbation(self) -> float | None:
        """Δq: as given, or as chosen at the first step (None before)."""
        if self._separations is None:
            return self._options.perturbation
        return float(self._separations.scalars("perturbation")[0])

    def vector(self, i: int = 0) -> list[Tensor]:
        """q_i, the separation of value i: shaped like the parameters, in their order; norm Δq.

        Raises:
            RuntimeError: before the first step.
            IndexError: i is not in 0..k-1.
        """
        if self._separations is None:
            raise RuntimeError("vector(): nothing was measured yet")
        if not 0 <= i < self.k:
            raise IndexError(f"i={i}: expected 0 to {self.k - 1}")
        return self._separations.vectors()[i]

    def history(self, after: int = 0) -> CurvatureHistory:
        """The measurements so far, as many as the buffer holds, as columns on the host.

        Args:
            after: leaves out the first so many measurements (all ever taken count).

        Raises:
            RuntimeError: the tracker was made with ``history=0``.
        """
        whole("after", after, 0)
        return self._kept("history()").read(after)

    @property
    def recorded(self) -> int:
        """How many measurements went into `history` since the start. Waits for the device."""
        return self._kept("recorded").recorded

    @property
    def history_capacity(self) -> int:
        """How many measurements `history` keeps; 0 for none."""
        return 0 if self._history is None else self._history.capacity

    @property
    def gradients(self) -> int:
        """How many gradients the measurements have taken so far, beside those at θ."""
        return self._gradients

    @property
    def due(self) -> bool:
        """Whether the next step measures: every n-th, and the first; none while the optimizer has
        no preconditioner yet.
        """
        if self._given_metric is not None and not self._given_metric.ready:
            return False
        return self._calls % self.every == 0 or self._separations is None

    @property
    def calls(self) -> int:
        """How many steps were taken, measured or not."""
        return self._calls

    def _kept(self, what: str) -> Ring:
        if self._history is None:
            raise RuntimeError(f"{what}: this tracker was made with history=0")
        return self._history

    # --- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; loads with
        ``torch.load(weights_only=True)``.
        """
        return {
            "format": _FORMAT,
            **self._kind(),
            "calls": self._calls,
            "gradients": self._gradients,
            "sizing": self._sizing.state_dict(),
            "separations": [] if self._separations is None else self._separations.state_dict(),
            "refinement": [] if self._separations is None else self._separations.refinement(),
            "history": None if self._history is None else self._history.state_dict(),
        }

    def _kind(self) -> dict[str, Any]:
        """What has to agree between a saved state and the tracker that takes it over."""
        return {
            "k": self.k,
            "which": self.which,
            "estimate": self.estimate,
            "mode": self.mode,
            "preconditioned": self._given_metric is not None,
            "sizes": [list(p.tensor.shape) for p in self._layout.parameters],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved tracker was.

        Raises:
            ValueError: it isn't a tracker's, or is of other parameters, another k, ``which``,
                ``estimate``, ``mode`` or preconditioner; nothing has changed then.
        """
        require_entries(state_dict, "format", of="a CurvatureTracker")
        saved = state_dict["format"]
        if not isinstance(saved, int) or saved != _FORMAT:
            raise ValueError(
                f"state_dict: of format {described(saved)}, this version of "
                f"lyapcuda reads {_FORMAT} (0.1.0 wrote 4): start a new tracker, which finds its "
                "separations again within some steps"
            )
        for name, mine in self._kind().items():
            saved = state_dict.get(name)
            if isinstance(saved, Tensor) or saved != mine:
                raise ValueError(
                    f"state_dict: {name} is {described(saved)}, but this tracker's is "
                    f"{described(mine)}"
                )
        require_entries(
            state_dict, "calls", "gradients", "refinement", "sizing", "separations", "history"
        )
        saved, calls = state_dict["separations"], state_dict["calls"]
        whole("state_dict: calls", calls, 0)
        whole("state_dict: gradients", state_dict["gradients"], 0)
        if not isinstance(saved, list) or len(saved) not in (0, len(self._ends)):
            raise ValueError(
                f"state_dict: separations={described(saved)}: which={self.which!r} has "
                f"{len(self._ends)}"
            )
        if saved and self._given_metric is not None and not self._given_metric.ready:
            raise ValueError(
                "state_dict: the optimizer has no preconditioner yet; load its state first"
            )
        history = state_dict["history"]
        if self._history is not None and history is not None:
            self._history.check(history)
        sizing = self._new_sizing()
        sizing.load_state_dict(state_dict["sizing"])
        loaded = [hook() for hook in tuple(self._load_hooks.values())]
        present = self._separations
        if saved:
            before = self.separations.refinement()
            try:
                self.separations.load_refinement(state_dict["refinement"])
                self.separations.load_state_dict(saved)
            except BaseException:
                self.separations.load_refinement(before)
                self._separations = present
                raise
        if not saved:
            self._separations = None
        self._sizing = sizing
        self._calls, self._gradients = int(calls), int(state_dict["gradients"])
        if self._history is not None:
            self._history.restart(self._calls)
            if history is not None:
                self._history.load_state_dict(history)
        for done in loaded:
            done()
