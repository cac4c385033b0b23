"""LyapunovSGD in two halves: clipping, micro-batches, parts, hooks, groups that change."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import lyapcuda
from nets import case
from optim_cases import exact, quadratic


def test_measure_and_step_are_a_step_in_two_halves():
    runs = []
    for halves in (False, True):
        truth = case("tanh_mlp", seed=2)
        optimizer = lyapcuda.LyapunovSGD(truth.model.parameters())
        losses = []
        for _ in range(3):
            losses.append(float((optimizer.measure if halves else optimizer.step)(truth.closure)))
            if halves:
                assert optimizer.step() is None
        runs.append((losses, [p.detach().clone() for p in truth.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


def test_a_step_needs_a_measurement():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta])
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()
    optimizer.measure(closure)
    with pytest.raises(ZeroDivisionError):
        optimizer.measure(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step()  # the gradients of a failed measurement are no one's


def test_clipping_between_the_halves_shortens_the_step_and_not_the_curvature():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta])
    before = theta.detach().clone()
    optimizer.measure(closure)
    gradient = theta.grad.clone()
    clip_grad_norm_([theta], 1.0)
    optimizer.step()
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-6)
    clipped = gradient / gradient.norm()
    torch.testing.assert_close(before - theta.detach(), clipped / 4.0, rtol=1e-5, atol=0)


def test_clipping_inside_the_closure_shortens_the_step_not_the_curvature():
    theta, _ = quadratic([4.0, 1.0])
    tensor = torch.tensor([4.0, 1.0], dtype=torch.float64)

    def clips():
        theta.grad = None
        loss = 0.5 * (tensor * theta.square()).sum()
        loss.backward()
        clip_grad_norm_([theta], 1.0)
        return loss

    optimizer = exact([theta])
    optimizer.step(clips)
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-3)
    assert float(theta.grad.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2])
def test_micro_batches_give_the_mean_gradient_and_the_curvature_of_the_last(k):
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    scales = torch.tensor([[1.0], [1.0], [1.0], [4.0]], dtype=torch.float64)
    optimizer = exact([theta], k=k)
    loss = optimizer.measure(
        lambda batch: (batch * theta.square()).sum(1).mean() / 2, batches=[scales[:3], scales[3:]]
    )
    mean = float(scales.mean())
    assert float(loss) == pytest.approx(1.5 * mean)
    torch.testing.assert_close(theta.grad, torch.full_like(theta, mean))
    assert float(optimizer.tracker.h.reshape(-1)[0]) == pytest.approx(4.0, rel=1e-5)
    optimizer.step()
    assert float(theta[0]) < 1.0


def test_accumulation_inside_the_closure():
    theta, closure = quadratic([4.0, 1.0])

    def accumulates():
        for _ in range(4):
            (closure() / 4).backward()
        return closure().detach()

    optimizer = exact([theta])
    optimizer.step(accumulates)
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-6)
    torch.testing.assert_close(theta.grad, torch.tensor([4.0, 1.0], dtype=torch.float64))


def test_a_part_of_the_minibatch_measures_and_the_whole_trains():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta])
    optimizer.step(lambda: 2 * closure(), part=closure)
    assert float(optimizer.lr) == pytest.approx(1 / 4.0, rel=1e-6)
    torch.testing.assert_close(theta.grad, torch.tensor([8.0, 2.0], dtype=torch.float64))


def test_every_nth_step_measures():
    theta, closure = quadratic([4.0, 1.0], start=0.01)
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return closure()

    optimizer = exact([theta], every=3, gain=0.1)
    optimizer.warmup(counted)
    calls, steps = 0, int(optimizer.tracker.steps)
    for _ in range(6):
        optimizer.step(counted)
    assert calls == 6 + 2 and int(optimizer.tracker.steps) == steps + 2


@pytest.mark.parametrize("how", ["every", "batches", "part"])
@pytest.mark.parametrize("k", [1, 2])
def test_gradients_that_were_not_measured_must_be_finite_too(how, k):
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], k=k, every=5 if how == "every" else 1, momentum=0.5)
    optimizer.warmup(closure)
    while optimizer.tracker.calls % optimizer.tracker.every == 0 and how == "every":
        optimizer.step(closure)
    before = theta.detach().clone()
    bad = {
        "every": lambda: optimizer.step(lambda: closure() * math.inf),
        "part": lambda: optimizer.step(lambda: closure() * math.inf, part=closure),
        "batches": lambda: optimizer.step(
            lambda b: closure() * b.sum(), batches=[torch.full((1,), math.inf), torch.ones(1)]
        ),
    }
    bad[how]()
    assert torch.equal(theta, before) and float(optimizer.lr) == 0.0
    optimizer.step(closure)
    assert not torch.equal(theta, before) and bool(torch.isfinite(theta).all())


def test_hooks_of_torchs_optimizers_are_called_around_a_step():
    theta, closure = quadratic([4.0, 1.0])
    optimizer, seen = exact([theta]), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    optimizer.step(closure)
    handle.remove()
    optimizer.step(closure)
    assert seen == ["before", "after", "before"]


def test_another_tracker_can_watch_it():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta])
    watcher = lyapcuda.CurvatureTracker([theta], which="SA")
    watcher.attach(optimizer)
    for _ in range(12):
        optimizer.step(closure)
    assert int(watcher.steps) >= 12
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-3)


def test_weight_decay_that_changes_reaches_gradient_and_curvature():
    a, closure = quadratic([4.0, 1.0])
    b = nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.5}]
    optimizer = exact(groups)
    whole = lambda: closure() + 0.5 * b.square().sum()  # noqa: E731
    optimizer.step(whole)
    assert float(optimizer.tracker.h) == pytest.approx(4.5, rel=1e-5)
    optimizer.param_groups[0]["weight_decay"] = 2.0
    before = a.detach().clone()
    optimizer.step(whole)
    for _ in range(20):
        optimizer.tracker.step(whole)
    assert float(optimizer.tracker.h) == pytest.approx(6.0, rel=1e-4)
    step = before - a.detach()
    torch.testing.assert_close(step, float(optimizer.lr) * (a.grad + 2.0 * before))


def test_zero_grad_and_defaults_are_torchs():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], momentum=0.5)
    optimizer.step(closure)
    optimizer.zero_grad()
    assert theta.grad is None
    assert set(optimizer.defaults) <= set(optimizer.param_groups[0])
    assert {"lr", "momentum", "nesterov", "weight_decay", "max_lr"} <= set(optimizer.defaults)
    assert "momentum_buffer" in optimizer.state[theta]


def test_add_param_group_keeps_momentum_and_settings():
    a, closure = quadratic([4.0, 1.0])
    b = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = exact([a], momentum=0.5)
    optimizer.step(closure)
    held = optimizer.state[a]["momentum_buffer"].clone()
    optimizer.add_param_group({"params": [b], "gain": 0.5, "momentum": 0.0})
    optimizer.measure(lambda: closure() + 4 * b.square().sum())
    expected = 0.5 * held + a.grad
    optimizer.step()
    torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], expected)
    assert "momentum_buffer" not in optimizer.state[b]
    assert float(optimizer.tracker.h) == pytest.approx(8.0, rel=1e-5)
