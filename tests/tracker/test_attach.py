"""Attaching to an optimizer, its wrappers and those that move first; models and optimizers as
`params`; torch.compile around all of it.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.objective.entry import untraced

F64 = torch.float64
_X, _Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def net(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def loss_of(model):
    return nn.functional.cross_entropy(model(_X.to(model[0].weight.dtype)), _Y)


def run(make, attach=None, steps=8, first=None):
    """The parameters after training with what ``make`` makes, and how often the closure ran.

    Args:
        attach: called with the optimizer and the model before the first step.
        first: called before every step, as for SAM's first pass.
    """
    model = net()
    optimizer = make(model)
    if attach is not None:
        attach(optimizer, model)
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        if first is not None:
            first(model)
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()], evaluations


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def wrapper(module, name, base=torch.optim.Optimizer):
    """A class of that name, as frameworks write theirs: Optimizer.__init__ is never called."""

    class Wrapper(base):
        def __init__(self, inner):
            self._optimizer = inner

        optimizer = property(lambda self: self._optimizer)
        param_groups = property(lambda self: self._optimizer.param_groups)

        def step(self, closure=None):
            return self._optimizer.step(closure)

        def zero_grad(self):
            self._optimizer.zero_grad()

    Wrapper.__module__, Wrapper.__qualname__ = module, name
    return Wrapper


Accelerated = wrapper("accelerate.optimizer", "AcceleratedOptimizer")
Lightning = wrapper("lightning.pytorch.core.optimizer", "LightningOptimizer", object)
DeepSpeed = type("DeepSpeedOptimizerWrapper", (Accelerated,), {"__module__": "accelerate.utils"})
Bare = wrapper(__name__, "Bare")


class Duck:
    def __init__(self, inner):
        self.inner = inner


class Lookahead(torch.optim.Optimizer):
    """As timm's: hooks of its own, but a step that isn't patched to call them."""

    def __init__(self, inner):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), {}
        self.inner, self.param_groups = inner, inner.param_groups
        self.slow = [p.detach().clone() for p in inner.param_groups[0]["params"]]

    def zero_grad(self):
        self.inner.zero_grad()

    def step(self, closure=None):
        loss = self.inner.step(closure)
        with torch.no_grad():
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss


class SAM(torch.optim.SGD):
    """Steps with the gradient at θ + ρ·g/‖g‖, where it evaluates the closure."""

    through_data = False

    @torch.no_grad()
    def step(self, closure):
        parameters = self.param_groups[0]["params"]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
        moves = [p.grad * (0.5 / norm) for p in parameters]
        for p, move in zip(parameters, moves, strict=True):
            (p.data if self.through_data else p).add_(move)
        with torch.enable_grad():
            loss = closure()
        for p, move in zip(parameters, moves, strict=True):
            (p.data if self.through_data else p).sub_(move)
        super().step()
        return loss


class QuietSAM(SAM):
    through_data = True


# --- wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrappers", [[Accelerated], [Lightning], [Lightning, Accelerated]])
def test_wrappers_that_hand_the_closure_on_are_undone(wrappers):
    def make(model):
        optimizer = sgd(model)
        for kind in wrappers:
            optimizer = kind(optimizer)
        return optimizer

    tracker = None

    def attach(optimizer, model):
        nonlocal tracker
        tracker = lyapcuda.CurvatureTracker(model, debug=False)
        tracker.attach(optimizer)

    (plain, once), (tracked, twice) = run(make), run(make, attach)
    assert same(plain, tracked) and (once, twice) == (8, 16)
    assert float(tracker.steps) == 8


@pytest.mark.parametrize("kind", [Bare, Duck, DeepSpeed])
def test_other_wrappers_are_named_with_the_optimizer_inside(kind):
    model = net()
    inner = sgd(model)
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer") as caught:
        lyapcuda.CurvatureTracker(model).attach(kind(inner))
    attribute = "inner" if kind is Duck else "optimizer"
    assert f"attach to its `.{attribute}` (SGD)" in str(caught.value)
    assert str(caught.value).count("\n") <= 2 and not inner._optimizer_step_pre_hooks


def test_what_is_no_optimizer_is_named():
    model = net()
    schedule = torch.optim.lr_scheduler.StepLR(sgd(model), 1)
    tracker = lyapcuda.CurvatureTracker(model)
    with pytest.raises(TypeError, match="(?s)<StepLR>: expected a torch.*`.optimizer` .SGD"):
        tracker.attach(schedule)
    for other, words in (
        (model, "<Sequential of 3>"),
        ([sgd(model)], "<list of 1>"),
        (None, "None"),
    ):
        with pytest.raises(TypeError, match=f"optimizer={words}: expected a torch.optim.Optim"):
            tracker.attach(other)


def test_hooks_that_nobody_calls_yet_see_the_first_step_too():
    trackers = []

    def attach(optimizer, model):
        trackers.append(lyapcuda.CurvatureTracker(model))
        trackers[0].attach(optimizer)

    def make(model):
        return type("Fresh", (Lookahead,), {"step": Lookahead.step})(sgd(model))

    assert same(run(make)[0], run(make, attach)[0])
    assert float(trackers[0].steps) == 8


def test_attached_again_it_takes_the_place_of_what_was_before():
    model = net()
    optimizer, tracker = sgd(model), lyapcuda.CurvatureTracker(model, debug=False)
    parts = []

    def part():
        parts.append(1)
        return loss_of(model)

    first = tracker.attach(optimizer)
    second = tracker.attach(Accelerated(optimizer), measure=part)
    optimizer.step(lambda: loss_of(model))
    assert float(tracker.steps) == 1 and len(parts) == 2
    first.remove()
    optimizer.step(lambda: loss_of(model))
    assert float(tracker.steps) == 2
    second.remove()
    optimizer.step(lambda: loss_of(model).backward())
    assert float(tracker.steps) == 2


def test_without_a_closure_it_says_what_to_call_also_of_a_scaler():
    model = net()
    optimizer = sgd(model)
    lyapcuda.CurvatureTracker(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(
        ValueError, match="without a closure(.|\n)*GradScaler(.|\n)*scaler="
    ) as caught:
        scaler.step(optimizer)
    assert len(str(caught.value).splitlines()) == 3


# --- where it measures ---------------------------------------------------------------------------


def backward(model):
    model.zero_grad()
    loss_of(model).backward()


@pytest.mark.parametrize("kind", [SAM, QuietSAM])
@pytest.mark.parametrize("every", [1, 3])
def test_under_sam_it_measures_before_the_optimizer_moves(kind, every):
    """At θ, from the second step on; a tracker beside it measures the same there."""
    attached, at_theta = [], []

    def make(model):
        return kind(model.parameters(), lr=0.1)

    def attach(optimizer, model):
        attached.append(lyapcuda.CurvatureTracker(model, every=every, debug=False))
        attached[0].attach(optimizer)

    def measure(model):
        backward(model)
        if not attached:
            return
        if not at_theta:
            at_theta.append(lyapcuda.CurvatureTracker(model, every=every, debug=False))
        elif attached[0].calls > at_theta[0].calls - 1:
            at_theta[0].step(lambda: loss_of(model))

    plain, once = run(make, first=backward)
    with pytest.warns(UserWarning, match=f"{kind.__name__} moves the parameters") as said:
        tracked, more = run(make, attach, first=measure)
    assert same(plain, tracked) and len(said) == 1
    measured = len(range(0, 7, every))
    assert float(attached[0].steps) == measured and more - once == 2 * measured
    assert torch.equal(attached[0].h, at_theta[0].h)


def test_two_trackers_under_sam_and_two_beside_each_other():
    for make, first, measured in (
        (lambda model: SAM(model.parameters(), lr=0.1), backward, 7),
        (sgd, None, 8),
    ):
        trackers = []

        def attach(optimizer, model, trackers=trackers):
            trackers += [lyapcuda.CurvatureTracker(model) for _ in range(2)]
            for tracker in trackers:
                tracker.attach(optimizer)

        plain, _ = run(make, first=first)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracked, _ = run(make, attach, first=first)
        assert same(plain, tracked)
        assert [float(t.steps) for t in trackers] == [measured] * 2
        assert torch.equal(trackers[0].h, trackers[1].h)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
        lambda model: Lookahead(sgd(model)),
        lambda model: torch.optim.AdamW(model.parameters()),
    ],
    ids=["LBFGS", "Lookahead", "AdamW"],
)
def test_others_evaluate_at_theta_first_and_are_measured_there(make):
    trackers = []

    def attach(optimizer, model):
        trackers[:] = [lyapcuda.CurvatureTracker(model) for _ in range(2)]
        trackers[0].attach(optimizer)

    tracked, _ = run(make, attach, first=lambda m: trackers[1].step(lambda: loss_of(m)))
    assert same(run(make)[0], tracked)
    assert torch.equal(trackers[0].h, trackers[1].h)


class Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Twice(torch.optim.SGD):
    def step(self, closure):
        loss = closure()
        super().step()
        super().step()
        return loss


@pytest.mark.parametrize("kind", [Derived, Twice])
def test_a_step_that_calls_that_of_its_base_is_measured_once(kind):
    """torch calls the hooks of both."""
    trackers = []

    def make(model):
        torch.optim.SGD(model.parameters())  # (from then on SGD.step has hooks)
        return kind(model.parameters(), lr=0.1)

    def attach(optimizer, model):
        trackers[:] = [lyapcuda.CurvatureTracker(model) for _ in range(2)]
        for tracker in trackers:
            tracker.attach(optimizer)

    assert same(run(make)[0], run(make, attach)[0])
    assert [float(t.steps) for t in trackers] == [8, 8]
    model = net()
    optimizer = make(model)
    attach(optimizer, model)
    optimizer.step(lambda: loss_of(model))
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()


# --- a model, an optimizer -----------------------------------------------------------------------


def curvature(params, model, steps=60, **options):
    tracker = lyapcuda.CurvatureTracker(params, **options)
    for _ in range(steps):
        tracker.step(lambda: loss_of(model))
    return float(tracker.h)


def test_a_module_stands_for_its_named_parameters():
    model = net(F64)
    named = lyapcuda.CurvatureTracker(model)
    assert [p.name for p in named.layout.parameters] == [n for n, _ in model.named_parameters()]
    assert curvature(model, model, 5) == curvature(model.parameters(), model, 5)
    frozen = net(F64).requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 4 parameters requires"):
        lyapcuda.CurvatureTracker(frozen)
    found = [lyapcuda.eigsh(lambda: loss_of(model), p, tol=1e-6) for p in (model, sgd(model))]
    exact = lyapcuda.eigsh(lambda: loss_of(model), model.parameters(), tol=1e-6).eigenvalues
    assert all(torch.equal(f.eigenvalues, exact) for f in found)
    some = lyapcuda.HessianOperator(lambda: loss_of(model), model, select="2.*")
    assert some.shape == (27, 27)


def test_a_modules_buffers_are_put_back_without_asking_the_collector(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    monkeypatch.setattr("lyapcuda.tracker.modules_of", lambda _: [])
    before = model[1].running_mean.clone()
    lyapcuda.CurvatureTracker(model).step(lambda: model(_X).square().mean())
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize(
    "make, counts",
    [
        (lambda p, wd: torch.optim.SGD(p, lr=0.1, weight_decay=wd), True),
        (lambda p, wd: torch.optim.Adam(p, weight_decay=wd), True),
        (lambda p, wd: torch.optim.Adam(p, weight_decay=wd, decoupled_weight_decay=True), False),
        (lambda p, wd: torch.optim.RAdam(p, weight_decay=wd, decoupled_weight_decay=True), False),
        (lambda p, wd: torch.optim.AdamW(p, weight_decay=wd), False),
        (lambda p, wd: torch.optim.Adafactor(p, weight_decay=wd), False),
        (lambda p, wd: lyapcuda.LyapunovSGD(p, weight_decay=wd), True),
        (lambda p, wd: Accelerated(torch.optim.AdamW(p, weight_decay=wd)), False),
        (lambda p, wd: torch.optim.LBFGS(p), False),
    ],
)
def test_an_optimizer_stands_for_its_groups_and_decay_in_the_gradient_for_the_loss(make, counts):
    model = net(F64)
    tracker = lyapcuda.CurvatureTracker(make(model.parameters(), 0.25))
    assert len(tracker.parameters) == 4
    decays = {group.weight_decay for group in tracker.layout.groups}
    assert decays == ({0.25} if counts else {0.0})


def test_decay_of_an_optimizer_counts_in_h():
    model = net(F64)
    plain = curvature(model, model)
    decayed = curvature(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25), model)
    assert decayed == pytest.approx(plain + 0.25, rel=1e-3)


class Unknown(torch.optim.Optimizer):
    def step(self, closure=None):
        pass


def test_a_decay_of_which_one_cannot_tell_is_refused():
    model = net()
    make = Unknown(model.parameters(), {"lr": 0.1, "weight_decay": 0.1})
    ascent = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, maximize=True)
    for optimizer in (make, ascent):
        with pytest.raises(ValueError, match="can't tell whether its weight_decay"):
            lyapcuda.CurvatureTracker(optimizer)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        lyapcuda.CurvatureTracker(optimizer)
    make.param_groups[0].update(weight_decay=0.1, weight_decouple=False)
    assert lyapcuda.CurvatureTracker(make).layout.groups[0].weight_decay == 0.1


def test_an_optimizers_names_are_those_in_messages():
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    names = [p.name for p in lyapcuda.CurvatureTracker(optimizer).layout.parameters]
    assert names == [name for name, _ in model.named_parameters()]


def test_lyapunov_sgd_says_what_to_pass_for_a_module():
    with pytest.raises(TypeError, match="params=<Sequential of 3>.*pass model.parameters"):
        lyapcuda.LyapunovSGD(net())


# --- torch.compile -------------------------------------------------------------------------------


def test_compiled_training_steps_are_what_they_are_without():
    """`step` inside a compiled function, an attached optimizer's and LyapunovSGD's step, eigsh."""
    seen = []
    for compiled in (False, True):
        wrap = torch.compile(backend="eager") if compiled else lambda function: function
        models = [net() for _ in range(4)]
        tracker, attached = (lyapcuda.CurvatureTracker(m, debug=False) for m in models[:2])
        plain, watched = sgd(models[0]), sgd(models[1])
        attached.attach(watched)
        own = lyapcuda.LyapunovSGD(models[2].parameters())

        @wrap
        def train(plain=plain, tracker=tracker, watched=watched, own=own, models=models):
            loss = tracker.step(lambda: loss_of(models[0]), leave_grad=True)
            plain.step()
            watched.step(lambda: loss_of(models[1]))
            own.step(lambda: loss_of(models[2]))
            return loss

        @wrap
        def solve(model=models[3]):
            return lyapcuda.eigsh(lambda: loss_of(model), model).eigenvalues

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for _ in range(2):
                train()
            values = [tracker.h, attached.h, own.tracker.h, solve()]
        seen.append([*values, *(p.detach() for m in models for p in m.parameters())])
    assert same(*seen)


def test_a_compiled_model_in_the_closure_stays_compiled():
    runs = 0

    def backend(graph, _):
        def call(*inputs):
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return call

    model = net()
    compiled = torch.compile(model, backend=backend)
    tracker = lyapcuda.CurvatureTracker(model, debug=False)
    tracker.step(lambda: nn.functional.cross_entropy(compiled(_X), _Y))
    assert runs == 2


def test_nothing_is_imported_for_it_before_somebody_else_compiles(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert untraced(lambda x: x + 1)(1) == 2
    assert "torch._dynamo" not in sys.modules
