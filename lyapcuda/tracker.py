"""CurvatureTracker: the leading curvatures of any training run, from k + 1 gradients a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lyapcuda import ops
from lyapcuda.arguments import choice, fraction, positive, whole
from lyapcuda.attach import measure_within
from lyapcuda.dynamics.benettin import Benettin, advance, excuse
from lyapcuda.dynamics.separation import Separation
from lyapcuda.dynamics.separations import ENDS, ends_of, new_separation
from lyapcuda.history import Ring
from lyapcuda.objective.evaluator import Closure, gradients
from lyapcuda.objective.interrupts import allowed, deferred
from lyapcuda.objective.isolation import Loose, Surroundings, modules_of
from lyapcuda.objective.loss_graph import is_smooth, loss_epsilon
from lyapcuda.objective.micro_batches import Measured, accumulated, beside, shares
from lyapcuda.objective.turns import Turns
from lyapcuda.params.collect import Parameters
from lyapcuda.params.flat import FlatLayout
from lyapcuda.params.ranks import RankError, Ranks, is_wrapper
from lyapcuda.params.shards import compute_epsilon
from lyapcuda.tracker_state import TrackerState

__all__ = ["CurvatureTracker"]


class CurvatureTracker(TrackerState):
    """Follows the largest (or smallest) eigenvalues of the loss's Hessian while something trains.

    A separation q is carried from step to step; each `step` evaluates the closure's gradient at θ
    and at θ + q on the same minibatch (same random numbers, same buffers) and lets both copies
    climb (Algorithm 1 of the paper; for ``which="SA"`` descend, App. A). How fast they part is the
    Lyapunov exponent, and the difference of the gradients the curvature. With k > 1 there are k
    copies beside θ, whose separations are kept orthogonal (App. C): k + 1 gradients and two panels
    of k·N floats. Everything stays on the device until read: `h`, `interval` and the rest are
    device tensors.

    Args:
        params: tensors, (name, tensor) pairs, or groups, as for torch.optim. A group's
            "weight_decay" counts as part of the loss (½·wd·‖θ‖²), as in torch.optim.SGD.
        k: how many eigenvalues, up to 32 from either end. For k > 1 what is read off is a vector
            of k values: from the outer end inwards, for "BE" from the largest to the smallest.
        every: measure at every n-th `step` only.
        perturbation: Δq, the norm of q. None chooses it from the parameters' size and precision
            (`lyapcuda.perturbation.default_perturbation`), from the second step on from what
            autograd's graph shows of the loss, the precision (autocast, TF32) and that it has no
            kinks (as ReLU has); the paper's is 5e-2.
        which: "LA", the largest (algebraic) eigenvalues h0, h1, …; "SA", the smallest, hN, …; or
            "BE", both ends at once, half of k at each (one more at the upper end where k is odd).
        estimate: what `h` is. "rayleigh": the Rayleigh quotient q·y/‖q‖², y = g(θ + q) − g(θ),
            unbiased and signed; the mean of the last two, which look from opposite sides of θ.
            For k > 1 the Ritz values, which are the Rayleigh quotients within the span of all q.
            "schwarz": y·y/(q·y) of the last step alone, half a step nearer to the eigenvector: the
            best where h0 moves or ``every`` > 1, and of sub-batches their own h0; one-sided in Δq.
            Not for ``which="SA"`` where no eigenvalue is negative: it errs outward of ρ.
            "growth": the exact inversion (e^λ − 1)/β of the growth. "paper": Algorithm 1 as printed
            (β starts at 1, β ← β/λ, h = 1/β), which converges to h0/(e − 1); as printed, a single
            λ < 0 turns β negative and the map around, which `rayleigh` then shows.
        beta: a fixed ascent rate (the learning rate of the map, for "SA" its α) instead of one that
            follows the curvature.
        momentum: m of the heavy-ball map (App. B), 0 for none; needs 2k more N-float buffers.
        weight_decay: for parameters whose group names none.
        ema: weight of the past in `h_ema`, in [0, 1).
        history: how many measurements `history` can look back on, kept on the device; 0 for none.
        seed: of the random first q; the global random states are not touched.
        model: the module or modules whose buffers, and whose other parameters' gradients, are put
            back between evaluations. Without it: every module that holds a tracked parameter, with
            its children. Give it where the closure runs modules beside those.
        process_group: the ranks that train one model together. Needed only where gradients are
            averaged by hand: DistributedDataParallel and DTensor parameters (FSDP2) tell. All
            ranks then take every `step` together, see docs/distributed.md.
        debug: evaluate the closure once more at every measurement, at θ, and raise a RuntimeError
            where it isn't the same function twice (another minibatch). Waits for the device.

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
        history: int = 1000,
        seed: int = 0,
        model: nn.Module | Iterable[nn.Module] | None = None,
        process_group: dist.ProcessGroup | None = None,
        debug: bool = False,
    ) -> None:
        positive("perturbation", perturbation)
        positive("beta", beta)
        choice("which", which, ENDS)
        choice("estimate", estimate, ops.ESTIMATES)
        fraction("momentum", momentum)
        fraction("ema", ema)
        whole("every", every)
        whole("k", k)
        whole("history", history, 0)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r}: expected a whole number in 0..2**63-1")
        models = () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)
        for module in models:
            if not isinstance(module, nn.Module):
                raise TypeError(f"model={type(module).__name__}: expected torch.nn.Module")
        self._layout = FlatLayout(params, weight_decay)
        if process_group is not None and self._layout.sharded:
            raise ValueError(
                f"process_group={process_group!r}: DTensor parameters have a mesh of their own"
            )
        for name, value in (("perturbation", perturbation), ("beta", beta)):
            if value is not None and value > self._layout.largest:
                raise ValueError(
                    f"{name}={value!r}: above {self._layout.largest:.4g}, which q holds"
                )
        self._ends = ends_of(which, k, self._layout.numel)
        self._tensors = [p.tensor for p in self._layout.parameters]
        self._names = [p.name for p in self._layout.parameters]
        self.k, self.every, self.which, self.estimate = k, every, which, estimate
        self._perturbation = perturbation
        self._options = dict(beta=beta, momentum=momentum, ema=ema, seed=seed)
        self._models, self._debug = models, debug
        self._process_group = process_group
        # All parameters of the optimizers we are attached to, by id.
        self._beside: dict[int, Tensor] = {}
        self._turns = Turns("tracker.step")
        self._modules: list[nn.Module] | None = None
        self._separations: list[Separation | Benettin] = []  # an end of the spectrum each
        self._calls = 0
        # ε of the coarsest type seen in the loss; None once Δq has been adapted to it.
        self._coarsest: float | None = 0.0
        # Whether all of it was seen to be smooth; None before anything was.
        self._smooth: bool | None = None
        ks = [each for _, each in self._ends]
        self._history = Ring(history, self._layout.device, ks) if history else None
        self._hooks: dict[int, Callable[[CurvatureTracker], None]] = OrderedDict()

    # --- measuring -------------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[..., Tensor | float],
        *,
        measure: Closure | None = None,
        batches: Iterable[Any] | None = None,
        leave_grad: bool = False,
    ) -> Tensor | None:
        """Measures once on the minibatch that the closure holds.

        Args:
            closure: takes nothing (with ``batches``: a batch) and returns the loss; may have called
                ``backward()`` itself, or leave that to us. Called k + 1 times: its random numbers
                are replayed.
            measure: another closure, of a part of the minibatch, to measure the curvature of; the
                gradient that ``leave_grad`` leaves is that of ``closure``. Costs k + 1 gradients of
                the part more than training alone.
            batches: micro-batches, as of `split_batch`: ``closure(batch)`` is called for each, and
                the gradient left (and the loss returned) is the average, weighted by their numbers
                of samples. The curvature is that of the last. Costs k gradients of the last more.
                BatchNorm sees one micro-batch at a time, as in gradient accumulation.
            leave_grad: False leaves no trace: parameters, their ``.grad``, buffers and random
                states are bitwise what they were. True leaves what one plain evaluation at θ with
                cleared gradients leaves: an optimizer's ``step()`` can follow, and the measurement
                has cost one gradient more, not two. A gradient that was there before is replaced,
                not added to: accumulate inside the closure, or over ``batches``.

        Returns:
            The loss at θ, detached. None when ``every`` skips this step (with ``leave_grad`` the
            gradient at θ is evaluated all the same).

        A loss or gradient that isn't finite leaves `h` and all of the state as they were and adds
        to `skipped`. After an exception of the closure everything is as it was. Another thread's
        call waits for this one.

        Raises:
            RuntimeError: the closure itself calls `step`; with ``debug``, it is another function
                each time.
            TypeError, ValueError: naming the argument; ``measure`` or ``batches`` without
                ``leave_grad`` (pass the part's own closure), or both of them.
        """
        if not callable(closure):
            raise TypeError(f"closure={closure!r}: expected a callable that returns the loss")
        if measure is not None and not callable(measure):
            raise TypeError(f"measure={measure!r}: expected a callable that returns the loss")
        if (measure is not None or batches is not None) and not leave_grad:
            raise ValueError(
                "leave_grad=False: measure and batches need leave_grad=True; to measure a part and "
                "leave no gradient, pass its closure alone"
            )
        if measure is not None and batches is not None:
            raise ValueError("measure and batches: expected one of them, got both")
        micro = None if batches is None else shares(batches)
        with deferred(), self._turns:
            return self._step(closure, measure, micro, leave_grad)

    def _step(
        self,
        closure: Closure,
        measure: Closure | None,
        micro: list[tuple[Any, float]] | None,
        leave_grad: bool,
    ) -> Tensor | None:
        measuring = self.due
        if not measuring and not leave_grad:
            self._count()
            return None
        separations = self._started() if measuring else []
        before = self._before_exchange() if measuring else None
        copies = [copy for separation in separations for copy in separation.place()]
        try:
            evaluated = self._evaluate(closure, measure, micro, copies, leave_grad)
            if measuring:
                for separation in separations:
                    separation.adapt(self._coarsest or 0.0, bool(self._smooth))
                advance(separations, evaluated.found)
        except BaseException as error:
            for separation in separations:
                separation.withdraw()
            if before is not None and isinstance(error, RankError):
                before.restore()
                before.restore_gradients()
            elif before is not None:
                excuse(separations)
            raise
        if measuring:
            self._coarsest = self._smooth = None
        evaluated.leave()
        self._count()
        if measuring:
            if self._history is not None:
                self._history.record(evaluated.loss, separations)
            with allowed():
                for hook in tuple(self._hooks.values()):
                    hook(self)
        return evaluated.loss

    def _before_exchange(self) -> Surroundings | None:
        """What is there before a step that other ranks may still call off; None for one process."""
        if self._layout.ranks is None:
            return None
        self._layout.ranks.check()
        return Surroundings(self._tensors, self._surrounding())

    def _evaluate(
        self,
        closure: Closure,
        measure: Closure | None,
        micro: list[tuple[Any, float]] | None,
        copies: list[list[Tensor]],
        leave: bool,
    ) -> Measured:
        if copies and self._coarsest is not None:
            closure, measure = self._watched(closure), measure and self._watched(measure)
        parameters = self._tensors
        where = dict(names=self._names, modules=self._surrounding(), check=self._debug)
        if micro is not None:
            return accumulated(closure, micro, parameters, copies, **where)
        if measure is not None and copies:
            return beside(measure, closure, parameters, copies, **where)
        found = gradients(closure, parameters, copies, leave=leave, **where)
        return Measured(found, found.loss0)

    def _watched(self, closure: Closure) -> Closure:
        """The closure, with an eye on its loss: the precision, kinks."""

        def watched(*batch: Any) -> Tensor | float:
            loss = closure(*batch)
            self._coarsest = max(self._coarsest or 0.0, loss_epsilon(loss))
            self._smooth = self._smooth is not False and is_smooth(loss)
            return loss

        return watched

    def _count(self) -> None:
        self._calls += 1
        if self._history is not None:
            self._history.tick()

    def attach(self, optimizer: Optimizer, *, measure: Closure | None = None) -> RemovableHandle:
        """Measures inside every ``optimizer.step(closure)`` from now on, at k gradients more.

        ``measure`` is as in `step`, called at each of them: a closure of a part of the minibatch
        that the optimizer's closure holds then. ``.grad`` is that of the optimizer's closure alone,
        as ``leave_grad`` leaves it.
        Returns a handle; ``handle.remove()`` ends it. ``optimizer.step()`` without a closure raises
        a ValueError: there is nothing to evaluate the second copy with.
        """

        def measured(closure: Closure) -> Tensor | None:
            return self.step(closure, measure=measure, leave_grad=True)

        return measure_within(optimizer, measured, self._notice)

    def _notice(self, parameters: Iterable[Tensor]) -> None:
        """Takes down whose gradients to put back; groups may be added to an optimizer later."""
        here = {id(p): p for p in parameters}
        if not here.keys() <= self._beside.keys():
            self._beside.update(here)
            self._modules = None

    def register_step_hook(self, hook: Callable[[CurvatureTracker], None]) -> RemovableHandle:
        """Calls ``hook(tracker)`` after every measurement: the step is complete by then, but an
        exception of the hook's reaches the caller of `step`.

        Returns a handle; ``handle.remove()`` ends it.
        """
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": OrderedDict()}  # a copy isn't what they watch

    def _surrounding(self) -> list[nn.Module]:
        if self._modules is None:
            self._modules = [*self._find_modules(), Loose(self._beside.values())]
        return self._modules

    def _started(self) -> list[Separation | Benettin]:
        if not self._separations:
            self._layout.compute_epsilon = compute_epsilon(self._surrounding())
            ranks = self._layout.ranks
            if ranks is not None:
                ranks.agree(self._arguments(), self._layout.device)
            options = dict(estimate=self.estimate, perturbation=self._perturbation)
            found = []
            for end, k in self._ends:
                found.append(new_separation(self._layout, end, k, **options, **self._options))
            if ranks is not None:
                for separation in found:
                    separation.replicate_(ranks)
            self._separations = found
        return self._separations

    def _find_modules(self) -> list[nn.Module]:
        """Those whose buffers are put back; sees to it who shares the parameters."""
        holders = modules_of([*self._tensors, *self._beside.values()])
        if self._layout.ranks is None and not self._layout.sharded:
            self._layout.ranks = Ranks.of_replicas(self._process_group, holders)
        if not self._models:
            return holders
        # DDP and FSDP2 have a say in every evaluation.
        found = [m for model in self._models for m in model.modules()]
        wrappers = [m for m in holders if is_wrapper(m) and all(m is not f for f in found)]
        return [*found, *wrappers]

    def _arguments(self) -> dict[str, float]:
        """What has to be the same on all ranks, as numbers."""
        values = {"numel": self._layout.numel, "k": self.k, "every": self.every}
        values |= {"which": list(ENDS).index(self.which)}
        values |= {"estimate": ops.ESTIMATES[self.estimate], "perturbation": self._perturbation}
        values |= self._options
        return {name: -1.0 if value is None else float(value) for name, value in values.items()}

    @property
    def layout(self) -> FlatLayout:
        """The tracked parameters in groups, as they lie in flat buffers."""
        return self._layout

    @property
    def separations(self) -> list[Separation | Benettin]:
        """What carries q from step to step, for every end of the spectrum."""
        return self._started()

    @property
    def parameters(self) -> list[Tensor]:
        """The tracked tensors, in the user's order."""
        return list(self._tensors)

    @property
    def state(self) -> Tensor:
        """The scalars as one device vector (a live view): with k = 1 the fields
        `lyapcuda.ops.STATE_FIELDS`, else `lyapcuda.ops.panel_fields`; for "BE" the upper
        end's.
        """
        return self._started()[0].state

    def restart_average(self) -> None:
        """Lets `h_ema` begin anew at the present `h`."""
        for separation in self._started():
            separation.restart_average()
