"""Training runs drawn at random, to be run with and without curvature measured beside them: what
they leave has to be the same to the bit.

A draw is one integer: `draw(seed)`. `train` runs it, and `differences` names what two runs differ
in. `refused` runs what can't be measured without a change of training: an error has to say so, and
leave everything as it was.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lyapcuda
from fault_cases import bits
from lyapcuda.objective import pointing
from watched_nets import SCENES, Part, Scene

__all__ = ["FAULTS", "WAYS", "Draw", "differences", "draw", "kinds", "refused", "train"]

at_a_copy = getattr(lyapcuda, "at_a_copy", pointing.at_a_copy)

#: How many times every optimizer steps.
STEPS = 4

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD, Nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW, foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 100, cycle_momentum=False),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}
#: Beside training; by a call that takes the place of loss.backward(); inside the optimizer.
WAYS = ("step", "step, leave_grad", "backward", "attach", "solvers")
#: What the optimizer's or the tracker's closure does.
CLOSURES = ("loss", "backward", "zero_grad, backward")
METRICS = ("module", "meter", "list")
#: Scenes whose loss has exact products, those whose modules can't be copied for an average, and
#: those where the mean over micro-batches adds gradients up in another order than a loop does, and
#: those that write to their weights, so that their gradients aren't wholly those of their losses.
_SMOOTH = {"tanh", "gelu", "dropout", "tied", "shared", "counter", "hidden state", "running mean"}
_SMOOTH |= {"conv, BatchNorm", "encoder, head", "bank, buffer", "host's noise", "frozen", "unused"}
_NO_COPY = {"weight_norm, old", "late buffer", "functional_call, fresh module"}
_IN_PARTS = {
    "input's gradient",
    "input's gradient, from midway",
    "GAN",
    "GAN, toggled",
    "encoder, head, two optimizers",
}
_IN_PARTS |= {"checkpoint, reentrant"}
_WRITE = {"tied, max_norm", "clamped"}


@dataclass(frozen=True)
class Loop:
    """How something is trained.

    Attributes:
        by_closure: ``optimizer.step(closure)``, not ``loss.backward()`` and ``optimizer.step()``.
        closure: one of `CLOSURES`.
        zero: gradients are set to "none" or "zeros" before a step, or "never".
        micro: batches whose gradients are accumulated for one step.
        whole: the closure calls ``backward()`` on its share of them, and returns the whole loss.
        clip: "norm" or "value", before the step; by closure inside of it, after its backward().
        amp: "autocast" of the forward pass, "around" the whole step, or a GradScaler ("scaler").
        hook: that reads gradients: of a "tensor", a "module", or "post" accumulation.
        metric: one of `METRICS`, which the closure updates.
    """

    by_closure: bool = False
    closure: str = "loss"
    optimizer: str = "SGD"
    zero: str = "none"
    micro: int = 1
    whole: bool = False
    clip: str | None = None
    amp: str | None = None
    scheduler: str | None = None
    ema: bool = False
    hook: str | None = None
    metric: str | None = None


@dataclass(frozen=True)
class Draw:
    """What is trained, how, and how it is watched: a way of `WAYS`, the tracker's options, and an
    argument of the measurement, "measure" or "batches".
    """

    seed: int
    scene: str
    loop: Loop
    way: str
    options: dict[str, Any] = field(default_factory=dict)
    argument: str | None = None


def draw(seed: int) -> Draw:
    """Returns the draw of a number. Successive numbers go through all scenes."""
    rng = random.Random(seed)

    def one(*choices: Any) -> Any:
        return rng.choice(choices)

    scene, way = list(SCENES)[seed % len(SCENES)], one(*WAYS)
    exact = way not in ("attach", "solvers") and scene in _SMOOTH and one(True, False)
    by_closure = way == "attach" or (way != "step, leave_grad" and one(True, False))
    by_closure = by_closure and (way == "backward" or not exact)
    optimizer = one(*OPTIMIZERS) if by_closure and not exact else one(*list(OPTIMIZERS)[:-1])
    lbfgs = optimizer == "LBFGS"
    in_call = way in ("step, leave_grad", "backward")
    argument = one(None, "measure") if in_call or way == "attach" else None
    if in_call and not by_closure and scene not in _IN_PARTS:
        argument = one(argument, "batches")
    halves = argument == "batches"
    # What an optimizer is given calls backward() itself; exact products need the loss alone.
    closure = one(*CLOSURES[by_closure and way != "backward" :])
    closure = CLOSURES[0] if exact or halves else CLOSURES[2] if lbfgs else closure
    amp = [None, None, "autocast", *([] if by_closure else ["scaler"])]
    # Inside autocast torch goes on with the weights that it cast before they were written.
    amp += [] if lbfgs or scene in _WRITE else ["around"]
    loop = Loop(
        by_closure,
        closure,
        optimizer,
        one("none", "zeros", *() if halves or closure == CLOSURES[2] else ("never",)),
        2 if halves else 1 if lbfgs else one(1, 1, 2, 3),
        closure != CLOSURES[0] and one(True, False),
        one(None, "norm", "value"),
        None if exact else one(*amp),
        one(None, *SCHEDULERS),
        scene not in _NO_COPY and one(True, False, False),
        None if exact else one(None, None, "tensor", "module", "post"),
        one(None, None, *METRICS),
    )
    which = one("LA", "LA", "BE", "SA")
    options = {
        "k": one(2, 3) if which == "BE" else one(1, 1, 3),
        "which": which,
        "every": one(1, 1, 2),
        "tol": one(None, 0.3),
        "momentum": one(0.0, 0.5),
        "mode": "exact" if exact else "difference",
        "debug": False if scene in _WRITE else one(None, None, None, True, False),
    }
    return Draw(seed, scene, loop, way, {} if way == "solvers" else options, argument)


def kinds(draw: Draw) -> Iterable[str]:
    """Yields what a draw is made of, for a table."""
    yield f"scene: {draw.scene}"
    yield f"way: {draw.way}"
    for name, value in vars(draw.loop).items():
        if value not in (None, False):
            yield f"loop, {name}: {value}"
    for name, value in draw.options.items():
        yield f"tracker, {name}: {value}"
    if draw.argument:
        yield f"argument: {draw.argument}"


# --- metrics -------------------------------------------------------------------------------------


class MeanMetric(nn.Module):
    """The mean of what it is updated with, in plain attributes, as torchmetrics keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.count = torch.zeros(()), 0

    def update(self, value: Tensor) -> None:
        self.total += value
        self.count += 1


class Meter:
    """The mean of what it is updated with, by no class of torch's."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.total += float(value)
        self.count += 1


# --- what a run leaves ---------------------------------------------------------------------------


#: Entries that aren't a module's own: registers, hooks.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}


def _walk(name: str, thing: Any, found: dict[str, Any]) -> None:
    """Takes down the bits of everything in a thing, by name."""
    if isinstance(thing, nn.Module):
        for inner, module in thing.named_modules():
            own = {n: v for n, v in vars(module).items() if n not in _OF_EVERY_MODULE}
            for kind in ("_parameters", "_buffers"):
                own |= vars(module)[kind]
            own["hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
            for key, value in own.items():
                _walk(".".join(filter(None, (name, inner, key))), value, found)
    elif isinstance(thing, Tensor):
        gradient = thing.grad if thing.is_leaf else None
        found[name] = (bits(thing), thing.requires_grad)
        found[f"{name}.grad"] = bits(gradient)
    elif isinstance(thing, dict):
        found[f"{name}, entries"] = list(map(str, thing))
        for key, value in thing.items():
            _walk(f"{name}.{key}", value, found)
    elif isinstance(thing, list | tuple):
        found[f"{name}, length"] = len(thing)
        for key, value in enumerate(thing):
            _walk(f"{name}.{key}", value, found)
    elif hasattr(thing, "state_dict") and not isinstance(thing, type):
        _walk(name, thing.state_dict(), found)
    elif isinstance(thing, Meter):
        _walk(name, vars(thing), found)
    elif isinstance(thing, int | float | str | None):
        found[name] = bits(thing)


def _random_states() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "python": str(random.getstate()),
        "numpy": f"{numpy['state']['key'].tobytes()!r} {numpy['state']['pos']} {numpy['gauss']}",
    }


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Returns the names of what two runs have left differently."""
    return [n for n in first | second if first.get(n, ...) != second.get(n, ...)]


# --- running -------------------------------------------------------------------------------------


class _Run:
    """One training run.

    Args:
        draw: what is run.
        watched: measure curvature beside it.
        fault: one of `FAULTS`, in the closure.
    """

    def __init__(self, draw: Draw, watched: bool, fault: str | None = None) -> None:
        torch.manual_seed(draw.seed)
        random.seed(draw.seed)
        np.random.seed(draw.seed)
        self.draw, self.loop, self.watched, self.fault = draw, draw.loop, watched, fault
        self.scene: Scene = SCENES[draw.scene]()
        make = OPTIMIZERS[self.loop.optimizer]
        self.optimizers = [make(part.parameters) for part in self.scene.parts]
        kind = SCHEDULERS.get(self.loop.scheduler)
        self.schedulers = [kind(o) for o in self.optimizers] if kind else []
        self.scaler = torch.amp.GradScaler("cpu", 2.0**12, enabled=self.loop.amp == "scaler")
        self.ema = None
        if self.loop.ema:
            average = get_ema_multi_avg_fn(0.9)
            self.ema = AveragedModel(nn.ModuleList(self.scene.modules[:1]), multi_avg_fn=average)
        made = {"module": MeanMetric, "meter": Meter, "list": list}
        self.metric = made[self.loop.metric]() if self.loop.metric else None
        self.losses: list[Tensor] = []
        self.tracked = [p for p in self.scene.tracked if p.requires_grad]
        self._hold_hooks()
        self._part_measured: Callable[[], Tensor] | None = None
        self.tracker = None
        if watched and draw.way != "solvers":
            self.tracker = lyapcuda.CurvatureTracker(self.tracked, **draw.options)
            if draw.way == "attach":
                part = (lambda: self._part_measured()) if draw.argument else None
                self.tracker.attach(self.optimizers[0], measure=part)

    def state(self) -> dict[str, Any]:
        """The bits of all that training changes, by name."""
        found: dict[str, Any] = {}
        _walk("random", _random_states(), found)
        _walk("loose", self.scene.loose, found)
        for number, module in enumerate(self.scene.modules):
            _walk(f"module {number}", module, found)
        for name in ("metric", "losses", "optimizers", "schedulers", "scaler", "ema"):
            _walk(name, getattr(self, name), found)
        return found

    def run(self, steps: int = STEPS) -> None:
        for number in range(steps):
            for part, optimizer in zip(self.scene.parts, self.optimizers, strict=True):
                self._step(part, optimizer)
            if self.ema is not None:
                self.ema.update_parameters(nn.ModuleList(self.scene.modules[:1]))
            if number == 1:
                self.scene.midway()

    # --- a step ----------------------------------------------------------------------------------

    def _step(self, part: Part, optimizer: Optimizer) -> None:
        loop, batches = self.loop, [self.scene.batch() for _ in range(self.loop.micro)]
        mine = part is self.scene.parts[0]  # the one that is watched
        if loop.closure != CLOSURES[2] and loop.zero != "never":
            optimizer.zero_grad(set_to_none=loop.zero == "none")
        gradient = partial(self._gradient, part, optimizer, mine)
        with self._autocast("around"):
            if mine and self.draw.argument == "batches":
                loss = self._gradient_over(part, batches)
            else:
                for batch in batches[: len(batches) - loop.by_closure]:
                    loss = gradient(batch)
            if mine and self.watched and self.draw.way in ("step", "solvers"):
                self._beside(part, optimizer, batches[-1])
            if loop.by_closure:
                loss = optimizer.step(self._given(part, optimizer, batches[-1], gradient))
            else:
                self.scaler.unscale_(optimizer)
                if loop.clip:
                    self._clip(part.parameters, 0.05)
                self.scaler.step(optimizer)
                self.scaler.update()
        self.losses.append(loss.detach().clone())
        for scheduler, of in zip(self.schedulers, self.optimizers, strict=bool(self.schedulers)):
            if of is optimizer:
                scheduler.step(*[loss.detach()] if loop.scheduler == "plateau" else [])

    def _given(
        self, part: Part, optimizer: Optimizer, batch: Any, gradient: Callable[[Any], Tensor]
    ) -> Callable[[], Tensor]:
        """What the optimizer is given to step by."""
        if self.draw.way == "backward":
            return partial(gradient, batch)
        self._part_measured = partial(part.loss, batch)
        return self._closure(part, optimizer, batch)

    def _closure(
        self, part: Part, optimizer: Optimizer, batch: Any, counts: bool = True
    ) -> Callable[[], Tensor]:
        """The user's closure; ``counts``: it updates all metrics, not only modules."""
        loop, loss_of, scaler, metric = self.loop, part.loss, self.scaler, self.metric
        if loop.metric != "module" and not counts:
            metric = None

        def closure() -> Tensor:
            if loop.closure == CLOSURES[2]:
                optimizer.zero_grad(set_to_none=loop.zero == "none")
            with self._autocast("autocast"):
                whole = loss_of(batch)
                loss = whole / loop.micro
            if isinstance(metric, nn.Module):
                metric.update(loss.detach())
            elif metric is not None and not at_a_copy():
                metric.append(float(loss)) if loop.metric == "list" else metric.update(loss)
            if loop.closure != CLOSURES[0]:
                scaler.scale(loss).backward()
                if loop.by_closure and loop.clip:
                    self._clip(part.parameters, 0.05)
            return whole if loop.whole else loss

        return FAULTS[self.fault](closure, self, batch) if self.fault else closure

    def _gradient(self, part: Part, optimizer: Optimizer, mine: bool, batch: Any) -> Tensor:
        """Adds a batch's gradient to ``.grad`` and returns the loss, as the draw's way has it."""
        closure, way = self._closure(part, optimizer, batch), self.draw.way
        if mine and self.watched and way in ("backward", "step, leave_grad"):
            measure = partial(part.loss, batch) if self.draw.argument == "measure" else None
            return self._measured(closure, measure=measure)
        if mine and way == "step, leave_grad":
            self._forget()
        loss = closure()
        if self.loop.closure == CLOSURES[0]:
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _gradient_over(self, part: Part, batches: list[Any]) -> Tensor:
        """The same for the mean over micro-batches."""

        def loss_of(batch: Any) -> Tensor:
            with self._autocast("autocast"):
                return part.loss(batch)

        if self.watched:
            return self._measured(loss_of, batches=batches)
        if self.draw.way == "step, leave_grad":
            self._forget()
        losses = []
        for batch in batches:
            losses.append(loss_of(batch) / len(batches))
            self.scaler.scale(losses[-1]).backward()
        return sum(loss.detach() for loss in losses)

    def _measured(self, closure: Callable[..., Tensor], **arguments: Any) -> Tensor:
        if self.scaler.is_enabled():
            arguments["scaler"] = self.scaler
        if self.draw.way == "backward":
            return self.tracker.backward(closure, **arguments)
        return self.tracker.step(closure, leave_grad=True, **arguments)

    def _beside(self, part: Part, optimizer: Optimizer, batch: Any) -> None:
        """Measures and leaves no trace."""
        closure = self._closure(part, optimizer, batch, counts=False)
        if self.draw.way == "step":
            self.tracker.step(closure, scaler=self.scaler if self.scaler.is_enabled() else None)
            return
        operator = lyapcuda.HessianOperator(closure, self.tracked)
        operator @ torch.ones(sum(p.numel() for p in self.tracked))
        lyapcuda.eigsh(operator, 1, tol=0.3, maxiter=2)
        lyapcuda.trace(operator, samples=6)

    def _forget(self) -> None:
        """What comes first replaces gradients."""
        for p in self.tracked:
            p.grad = None

    def _clip(self, parameters: list[Tensor], bound: float) -> None:
        clip = clip_grad_norm_ if self.loop.clip == "norm" else clip_grad_value_
        clip([p for p in parameters if p.grad is not None], bound)

    def _autocast(self, kind: str) -> AbstractContextManager[Any]:
        on = self.loop.amp == kind
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    def _hold_hooks(self) -> None:
        """Hooks that read a gradient and change nothing."""

        def read(*what: Any) -> None:
            assert what is not None

        if self.loop.hook == "tensor":
            self.tracked[0].register_hook(read)
        elif self.loop.hook == "post":
            self.tracked[0].register_post_accumulate_grad_hook(read)
        elif self.loop.hook == "module" and self.scene.modules:
            self.scene.modules[0].register_full_backward_hook(read)


def train(draw: Draw, watched: bool, steps: int = STEPS) -> dict[str, Any]:
    """Returns the bits of all that a training run has changed, by name; gradients and losses are
    part of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = _Run(draw, watched)
        run.run(steps)
    return run.state()


# --- what has to be refused ----------------------------------------------------------------------

Closure = Callable[[], Tensor]


def _squares(closure: Closure, run: _Run, batch: Any) -> Closure:
    return lambda: closure().detach().square()


def _steps(closure: Closure, run: _Run, batch: Any) -> Closure:
    def stepping() -> Tensor:
        loss = closure()
        run.optimizers[0].step()
        return loss

    return stepping


def _updates_in_backward(closure: Closure, run: _Run, batch: Any) -> Closure:
    for p in run.tracked:
        inner = torch.optim.SGD([p], lr=0.1, momentum=0.9)

        def update(p: Tensor, inner: Optimizer = inner) -> None:
            inner.step()
            inner.zero_grad()

        p.register_post_accumulate_grad_hook(update)
    return closure


def _draws_batches(closure: Closure, run: _Run, batch: Any) -> Closure:
    others = iter([run.scene.batch() for _ in range(100)])
    (part,) = run.scene.parts

    def drawing() -> Tensor:
        loss = part.loss(next(others))
        loss.backward()
        return loss

    return drawing


def _computed_before(closure: Closure, run: _Run, batch: Any) -> Closure:
    (part,) = run.scene.parts
    loss = part.loss(batch)

    def computed() -> Tensor:
        loss.backward(retain_graph=True)
        return loss

    return computed


def _halves_gradients(closure: Closure, run: _Run, batch: Any) -> Closure:
    for p in run.tracked:
        p.register_hook(lambda g: 0.5 * g)
    return closure


#: Closures that can't be measured: made of a right one, the run and its batch.
FAULTS: dict[str, Callable[[Closure, _Run, Any], Closure]] = {
    "returns another loss than it differentiates": _squares,
    "steps an optimizer": _steps,
    "updates parameters in its backward pass": _updates_in_backward,
    "draws another minibatch each time": _draws_batches,
    "returns a loss computed before": _computed_before,
    "has hooks that halve its gradient": _halves_gradients,
}


def refused(fault: str, way: str, scene: str = "tanh", **options: Any) -> list[str]:
    """Measures once what has to be refused.

    Returns:
        What has changed; "nothing was refused" where no error came.
    """
    by_closure = way == "attach"
    loop = Loop(by_closure, "backward", "SGD, momentum", "never", metric="module")
    run = _Run(Draw(0, scene, loop, way, options), True, fault)
    (part,), (optimizer,) = run.scene.parts, run.optimizers
    batch = run.scene.batch()
    for p in run.tracked:
        p.grad = torch.ones_like(p)
    closure = run._closure(part, optimizer, batch)
    measure = {
        "step": lambda: run.tracker.step(closure),
        "attach": lambda: optimizer.step(closure),
    }.get(way, lambda: run._measured(closure))
    before = run.state()
    try:
        measure()
    except (RuntimeError, TypeError, ValueError):
        return differences(before, run.state())
    return ["nothing was refused"]
