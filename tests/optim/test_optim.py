"""LyapunovSGD: its step and the paper's, the warm-up, and what survives a bad minibatch."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case
from optim_cases import exact, quadratic


def test_the_step_is_one_over_h0():
    theta, closure = quadratic([4.0, 1.0, 0.5])
    optimizer = exact([theta])
    before = theta.detach().clone()
    loss = optimizer.step(closure)
    assert float(loss) == pytest.approx(2.75) and not loss.requires_grad
    assert float(optimizer.lr) == pytest.approx(0.25, rel=1e-6)
    expected = before - float(optimizer.lr) * theta.grad
    assert torch.allclose(theta.detach(), expected, rtol=1e-12)
    assert abs(theta[0].item()) < 1e-5  # the leading direction is solved in one step


def test_gain_and_weight_decay():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], gain=0.5, weight_decay=1.0)
    before = theta.detach().clone()
    optimizer.step(closure)
    lr = 0.5 / (4.0 + 1.0)  # the decay is part of the loss, so of the curvature
    assert float(optimizer.lr) == pytest.approx(lr, rel=1e-6)
    gradient = torch.tensor([4.0, 1.0]) * before + before
    assert torch.allclose(theta.detach(), before - lr * gradient, rtol=1e-6)


def test_warm_up_does_not_train_and_stops_when_stable():
    truth = case("tanh_mlp", seed=1)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), estimate="growth")
    before = [p.detach().clone() for p in truth.model.parameters()]
    rng = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterations = optimizer.warmup(truth.closure)
    assert 4 <= iterations < 100
    assert all(map(torch.equal, before, truth.model.parameters()))
    assert all(p.grad is None for p in truth.model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert float(optimizer.tracker.h_ema) == float(optimizer.tracker.h)
    assert float(optimizer.tracker.h) == pytest.approx(truth.h0, rel=0.1)
    optimizer.step(truth.closure)
    assert int(optimizer.tracker.steps) == iterations + 1  # no second warm-up


def test_a_warm_up_that_never_settles_says_so():
    theta = nn.Parameter(torch.ones(3))
    optimizer = lyapcuda.LyapunovSGD([theta], estimate="growth", warmup_iterations=20)
    restless = (lambda s=s: (s * theta.square()).sum() for s in torch.rand(20, 3))
    with pytest.warns(UserWarning, match="not stable to 0.02 after 20 iterations"):
        optimizer.warmup(restless)


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_training_lowers_the_loss(kind):
    truth = case("gelu_mlp", seed=3, kind=kind)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    losses = [float(optimizer.step(truth.closure)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert sum(b > a for a, b in zip(losses, losses[1:], strict=False)) < 10


@pytest.mark.parametrize(
    ("spectrum", "estimate"),
    [([-3.0, -1.0], "growth"), ([0.0, 0.0], "growth"), ([0.0, 0.0], None), ([1e-9, 0.0], None)],
)
def test_without_curvature_the_step_is_bounded(spectrum, estimate):
    theta, closure = quadratic(spectrum)
    optimizer = exact([theta], max_lr=0.5, estimate=estimate, warmup_iterations=10)
    optimizer.step(closure)
    assert float(optimizer.lr) == 0.5
    assert bool(torch.isfinite(theta).all())


def test_a_batch_that_is_not_finite_changes_nothing():
    truth = case("tanh_mlp", seed=2)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    for _ in range(3):
        optimizer.step(truth.closure)
    before = [p.detach().clone() for p in truth.model.parameters()]
    h = optimizer.tracker.h_ema
    optimizer.step(lambda: truth.closure() * math.inf)
    assert all(map(torch.equal, before, truth.model.parameters()))
    assert torch.equal(optimizer.tracker.h_ema, h) and float(optimizer.lr) == 0.0
    optimizer.step(truth.closure)
    assert not torch.equal(before[0], next(truth.model.parameters()))


def test_an_exception_in_the_closure_changes_nothing():
    truth = case("tanh_mlp", seed=2)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    optimizer.step(truth.closure)
    before = [p.detach().clone() for p in truth.model.parameters()]
    calls = 0

    def fails_on_the_second_call():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("here")
        return truth.closure()

    with pytest.raises(RuntimeError, match="here"):
        optimizer.step(fails_on_the_second_call)
    assert all(map(torch.equal, before, truth.model.parameters()))


def test_groups_have_their_own_gain():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = exact([{"params": [a]}, {"params": [b], "gain": 0.1}], warmup_tol=1e-6)
    optimizer.step(lambda: (a.square() + b.square()).sum())
    moved_a, moved_b = 1 - a[0].item(), 1 - b[0].item()
    assert moved_a == pytest.approx(1.0, rel=1e-2)
    assert moved_b == pytest.approx(0.1 * moved_a, rel=1e-4)


def test_add_param_group_starts_the_measurement_again():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = lyapcuda.LyapunovSGD([a], ema=0.0)
    optimizer.step(lambda: a.square().sum())
    optimizer.add_param_group({"params": [b], "gain": 0.5})
    optimizer.step(lambda: a.square().sum() + 4 * b.square().sum())
    assert float(optimizer.tracker.h) == pytest.approx(8.0, rel=0.05)
    for bad in ({"params": [nn.Parameter(torch.ones(1))], "gain": -1.0}, {"params": []}):
        with pytest.raises(ValueError, match="gain=-1.0|params: empty"):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("shape", ["transposed", "every_second"])
def test_parameters_of_any_stride(shape):
    base = torch.randn(6, 8)
    theta = nn.Parameter(base.t() if shape == "transposed" else base[:, ::2])
    start = theta.detach().clone()
    optimizer = lyapcuda.LyapunovSGD([theta], ema=0.0)
    optimizer.step(lambda: theta.square().sum())
    expected = start - float(optimizer.lr) * 2 * start
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_bitwise(dtype, tmp_path):
    def start():
        truth = case("tanh_mlp", seed=4, dtype=dtype)
        return truth, lyapcuda.LyapunovSGD(truth.model.parameters(), weight_decay=1e-3)

    truth, optimizer = start()
    for _ in range(5):
        optimizer.step(truth.closure)
    torch.save((truth.model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    resumed, resumed_optimizer = start()
    model_state, optimizer_state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.model.load_state_dict(model_state)
    resumed_optimizer.load_state_dict(optimizer_state)
    for _ in range(5):
        optimizer.step(truth.closure)
        resumed_optimizer.step(resumed.closure)
    assert all(map(torch.equal, truth.model.parameters(), resumed.model.parameters()))
    assert torch.equal(optimizer.lr, resumed_optimizer.lr)
    assert int(resumed_optimizer.tracker.steps) == int(optimizer.tracker.steps)


def test_state_of_another_model_is_refused_and_nothing_changes():
    truth, other = case("tanh_mlp", seed=4), case("linear", seed=4)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    optimizer.step(truth.closure)
    foreign = lyapcuda.LyapunovSGD(other.model.parameters(), gain=0.3)
    foreign.step(other.closure)
    saved = foreign.state_dict()
    before = optimizer.state_dict()
    for bad in (saved, torch.optim.SGD(truth.model.parameters(), lr=1.0).state_dict()):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
    assert optimizer.param_groups[0]["lr"] == 1.5
    after = optimizer.state_dict()
    assert torch.equal(
        after["tracker"]["separations"][0]["state"], before["tracker"]["separations"][0]["state"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, "gain=0.0"),
        ({"gain": math.nan}, "gain=nan"),
        ({"gain": 0.1, "lr": 0.1}, "gain and lr: expected one"),
        ({"gain": 1.0, "lr": 0.1}, "gain and lr: expected one"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"max_lr": None}, "max_lr=None"),
        ({"max_lr": -1.0}, "max_lr=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"perturbation": 0}, "perturbation=0"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"estimate": "x"}, "estimate='x'"),
        ({"warmup_tol": 0.0}, "warmup_tol=0.0"),
        ({"warmup_iterations": -1}, "warmup_iterations=-1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lyapcuda.LyapunovSGD(nn.Linear(3, 2).parameters(), **options)


def test_a_first_batch_that_is_not_finite_leaves_the_warm_up_for_later():
    truth = case("tanh_mlp", seed=2)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    optimizer.step(lambda: truth.closure() * math.nan)
    assert int(optimizer.tracker.steps) == 0
    optimizer.step(truth.closure)
    assert int(optimizer.tracker.steps) > 4
    assert float(optimizer.lr) == pytest.approx(1.5 / truth.h0, rel=0.2)


def test_warm_up_over_several_minibatches():
    theta = nn.Parameter(torch.ones(4))
    used = []

    def closures():
        for scale in [1.0, 3.0] * 50:
            used.append(scale)
            yield lambda scale=scale: scale * theta.square().sum()

    with pytest.warns(UserWarning, match="not stable"):
        optimizer = lyapcuda.LyapunovSGD([theta], estimate="growth", warmup_iterations=10)
        iterations = optimizer.warmup(closures())
    assert iterations == 10 and used[:4] == [1.0, 3.0, 1.0, 3.0]


def test_a_deep_copy_goes_on_alike():
    truth = case("tanh_mlp", seed=2)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
    optimizer.step(truth.closure)
    model, twin = copy.deepcopy((truth.model, optimizer))
    x = torch.randn(9, 6)
    optimizer.step(lambda: truth.model(x).square().sum())
    twin.step(lambda: model(x).square().sum())
    assert all(map(torch.equal, truth.model.parameters(), model.parameters()))


def test_a_closure_is_needed():
    with pytest.raises(RuntimeError, match="closure"):
        lyapcuda.LyapunovSGD(nn.Linear(3, 2).parameters()).step(None)
    with pytest.raises(TypeError, match="closure"):
        lyapcuda.LyapunovSGD(nn.Linear(3, 2).parameters()).measure(None)
