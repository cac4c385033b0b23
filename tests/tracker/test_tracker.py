"""CurvatureTracker: its contract with a training loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(8)]
    return model, batches


def train(model, batches, tracker=None, steps=8, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for step in range(steps):
        x, y = batches[step % len(batches)]

        def closure(x=x, y=y):
            return nn.functional.cross_entropy(model(x), y)

        if tracker is not None and options:
            tracker.step(closure, **options)
        else:
            if tracker is not None:
                tracker.step(closure)
            optimizer.zero_grad()
            closure().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"leave_grad": True}])
def test_training_is_bitwise_what_it_is_without(problem, options):
    model, batches = problem
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plain = train(model, batches)
    model.load_state_dict(start)
    tracked = train(model, batches, lyapcuda.CurvatureTracker(model.parameters()), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


def test_attach_measures_inside_the_optimizers_step(problem):
    model, batches = problem
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def run(attach):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=False)
        handle = tracker.attach(optimizer) if attach else None
        evaluations = 0
        torch.manual_seed(1)
        for x, y in batches:

            def closure(x=x, y=y):
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        if attach:
            assert int(tracker.steps) == len(batches)
            with pytest.raises(ValueError, match="without a closure"):
                optimizer.step()
            handle.remove()
            optimizer.step()
        else:
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], evaluations

    (plain, once), (attached, twice) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, attached, strict=True))
    assert (once, twice) == (8, 16)  # one gradient more a step, not two


def test_one_gradient_more_with_leave_grad_and_every(problem):
    model, batches = problem
    x, y = batches[0]
    evaluations = 0

    def closure():
        nonlocal evaluations
        evaluations += 1
        return nn.functional.cross_entropy(model(x), y)

    tracker = lyapcuda.CurvatureTracker(model.parameters(), every=4, debug=False)
    losses = [tracker.step(closure, leave_grad=True) for _ in range(8)]
    assert evaluations == 8 + 2 and int(tracker.steps) == 2
    assert all(loss is not None for loss in losses)
    assert all(p.grad is not None for p in model.parameters())
    evaluations = 0
    tracker = lyapcuda.CurvatureTracker(model.parameters(), every=4, debug=False)
    losses = [tracker.step(closure) for _ in range(8)]
    assert evaluations == 4
    assert [loss is None for loss in losses] == [False, True, True, True] * 2


@pytest.mark.parametrize("estimate", ["rayleigh", "growth", "paper", "schwarz"])
@pytest.mark.parametrize("bad", ["loss", "gradient", "float"])
def test_not_finite_leaves_h_and_the_state_as_they_were(problem, estimate, bad):
    model, batches = problem
    x, y = batches[0]
    model.eval()

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    def broken():
        loss = closure()
        if bad == "loss":
            return loss * math.nan
        if bad == "gradient":  # the loss is finite, its gradient is not
            return loss + (model[0].weight.sum() * 0).sqrt()
        loss.backward()
        return math.inf

    tracker = lyapcuda.CurvatureTracker(model.parameters(), estimate=estimate)
    twin = lyapcuda.CurvatureTracker(model.parameters(), estimate=estimate)
    for _ in range(4):
        tracker.step(closure)
        twin.step(closure)
    before = tracker.state_dict()["separations"][0]
    for _ in range(3):
        tracker.step(broken)
    after = tracker.state_dict()["separations"][0]
    for saved in (before, after):
        for counted in ("skipped", "accepted"):
            lyapcuda.ops.state_field(saved["state"], 1, counted).zero_()
    assert torch.equal(after["state"], before["state"])
    assert torch.equal(after["q"][0], before["q"][0])
    assert int(tracker.skipped) == 3 and int(tracker.steps) == 4
    for _ in range(3):
        tracker.step(closure)
        twin.step(closure)
        assert torch.equal(tracker.h, twin.h)


def test_not_finite_at_the_very_first_step(problem):
    model, batches = problem
    x, y = batches[0]
    model.eval()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    assert math.isnan(float(tracker.h)) and int(tracker.steps) == 0
    tracker.step(lambda: nn.functional.cross_entropy(model(x), y) * math.nan)
    assert math.isnan(float(tracker.h)) and int(tracker.skipped) == 1
    for _ in range(60):
        tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    other = lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(60):
        other.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert float(tracker.h) == pytest.approx(float(other.h), rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_state_dict_round_trip_is_bitwise(problem, momentum, tmp_path):
    model, batches = problem
    options = dict(momentum=momentum, beta=0.05 if momentum else None)

    def closures():
        for x, y in batches:
            yield lambda x=x, y=y: nn.functional.cross_entropy(model(x), y)

    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
    for closure in closures():
        tracker.step(closure)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    resumed = lyapcuda.CurvatureTracker(model.parameters(), seed=99, **options)
    resumed.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    for closure in closures():
        tracker.step(closure)
        resumed.step(closure)
    for name in ("h", "h_ema", "exponent", "beta", "residual", "interval"):
        assert torch.equal(getattr(tracker, name), getattr(resumed, name))
    assert all(map(torch.equal, tracker.vector(), resumed.vector()))


def test_state_of_another_model_is_refused_and_nothing_changes(problem):
    model, batches = problem
    x, y = batches[0]
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(2):  # the first leaves the exponent NaN, which equals nothing
        tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    before = tracker.state_dict()["separations"][0]["state"].clone()
    other = lyapcuda.CurvatureTracker(nn.Linear(6, 3).parameters())
    for saved, message in [
        (other.state_dict(), "sizes"),
        ({**tracker.state_dict(), "which": "SA"}, "which is 'SA'"),
        ({**tracker.state_dict(), "k": 3}, "k is 3"),
        ({"weights": 1}, "not the state"),
        (None, "expected a dictionary"),
        ({**tracker.state_dict(), "calls": "three"}, "calls='three'"),
        ({**tracker.state_dict(), "separations": 7}, "separations=7"),
        ({**tracker.state_dict(), "separations": [{}] * 2}, "separations=.*has 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            tracker.load_state_dict(saved)
    assert torch.equal(tracker.state_dict()["separations"][0]["state"], before)


def test_copies_of_a_tracker_and_its_model_go_on_alike(problem):
    model, batches = problem
    x, y = batches[0]
    model.eval()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    twin_model, twin = copy.deepcopy((model, tracker))
    for _ in range(3):
        tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
        twin.step(lambda: nn.functional.cross_entropy(twin_model(x), y))
    assert torch.equal(tracker.h, twin.h)


def test_a_tracker_attached_to_another_ones_optimizer_measures_at_theta():
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    optimizer = lyapcuda.LyapunovSGD(
        truth.model.parameters(), perturbation=0.5, warmup_iterations=1, estimate="growth"
    )
    inner = lyapcuda.CurvatureTracker(truth.model.parameters(), debug=False)
    weight, seen = truth.model[0].weight, []
    step = inner._take_step
    inner._take_step = lambda *a, **k: (seen.append(weight.detach().clone()), step(*a, **k))[1]
    inner.attach(optimizer)
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match="not stable"):
        optimizer.step(truth.closure)
    assert len(seen) == 1 and torch.equal(seen[0], before)


def test_parameters_that_no_longer_take_part_are_an_error():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="closure.*replaced"):
        tracker.step(lambda: model(x).square().sum())


def test_the_global_random_state_is_not_touched_by_the_seed(problem):
    model, batches = problem
    before = torch.get_rng_state()
    trackers = [lyapcuda.CurvatureTracker(model.parameters(), seed=s) for s in (0, 0, 1)]
    x, y = batches[0]
    for tracker in trackers:
        tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trackers[0].h, trackers[1].h) and not torch.equal(
        *[t.h for t in trackers[1:]]
    )


def test_values_are_snapshots(problem):
    model, batches = problem
    x, y = batches[0]
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    h, text = tracker.h, str(tracker.h)
    tracker.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert str(h) == text and not torch.equal(h, tracker.h)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"perturbation": 0.0}, "perturbation=0.0"),
        ({"perturbation": -1.0}, "perturbation=-1.0"),
        ({"perturbation": math.nan}, "perturbation=nan"),
        ({"perturbation": "big"}, "perturbation='big'"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": math.inf}, "beta=inf"),
        ({"k": 0}, "k=0"),
        ({"k": -2}, "k=-2"),
        ({"k": 1.5}, "k=1.5"),
        ({"k": 10**6}, "k=1000000: there are only"),
        ({"k": 40}, "k=40: at most 32"),
        ({"k": 1, "which": "BE"}, "k=1: which=.BE. needs"),
        ({"every": 0}, "every=0"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"which": "XX"}, "which='XX'.*LA, SA, BE"),
        ({"estimate": "guess"}, "estimate='guess'"),
        ({"weight_decay": -1}, "weight_decay=-1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lyapcuda.CurvatureTracker(nn.Linear(30, 2).parameters(), **options)
