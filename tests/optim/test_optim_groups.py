"""LyapunovSGD's groups: frozen and thawed parameters, groups added later, one tracker for its life.

Also torch's other habits: lr as a name of the gain.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lyapcuda
from optim_cases import exact, quadratic

FLOAT64 = {"dtype": torch.float64}


@pytest.fixture
def pair():
    """Two parameters, and the closure of curvature 4 along the first, 9 along the second."""
    a, b = nn.Parameter(torch.ones(2, **FLOAT64)), nn.Parameter(torch.ones(3, **FLOAT64))
    b.requires_grad_(False)

    def closure():
        return 2.0 * a.square().sum() + (4.5 * b.square().sum() if b.requires_grad else 0.0)

    return a, b, closure


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_frozen_parameters_stay_until_they_are_thawed(pair, grouped, first):
    a, b, closure = pair
    members = [b, a] if first else [a, b]
    params = [{"params": [p]} for p in members] if grouped else members
    optimizer = exact(params, momentum=0.5, warmup_tol=1e-6)
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(0.25, rel=1e-5)
    assert torch.equal(b, torch.ones(3, **FLOAT64)) and optimizer.state_dict()["state"].keys() == {
        int(first)
    }
    held, tracker = optimizer.state[a]["momentum_buffer"].clone(), optimizer.tracker
    b.requires_grad_(True)
    optimizer.measure(closure)
    expected = 0.5 * held + a.grad
    optimizer.step()
    assert float(optimizer.lr) == pytest.approx(1 / 9, rel=1e-5)  # measured, warm-up included
    assert optimizer.tracker is tracker and tracker.layout.numel == 5
    torch.testing.assert_close(b.detach(), torch.zeros(3, **FLOAT64), rtol=0, atol=1e-5)
    torch.testing.assert_close(optimizer.state[a]["momentum_buffer"], expected)


def test_a_group_frozen_as_a_whole_may_be_added(pair):
    a, b, closure = pair
    optimizer = exact([a], warmup_tol=1e-6)
    optimizer.step(closure)
    steps = int(optimizer.tracker.steps)
    optimizer.add_param_group({"params": [b], "gain": 0.5})
    optimizer.step(closure)
    assert int(optimizer.tracker.steps) == steps + 1  # nothing new to measure
    b.requires_grad_(True)
    optimizer.step(closure)
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.5, **FLOAT64), rtol=1e-5, atol=0)


def test_with_all_parameters_frozen_there_is_an_error_at_the_first_step_only(pair):
    a, b, closure = pair
    a.requires_grad_(False)
    optimizer = exact([a, b], warmup_tol=1e-6)
    message = "none of the 2 parameters requires a gradient"
    for use in (lambda: optimizer.step(closure), lambda: optimizer.tracker):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match="none of the 1 parameters requires"):
        lyapcuda.CurvatureTracker([b])
    assert bool(torch.isnan(optimizer.lr))
    other = exact([a, b], warmup_tol=1e-6)
    other.load_state_dict(optimizer.state_dict())
    a.requires_grad_(True)
    other.load_state_dict(optimizer.state_dict())
    other.step(closure)
    assert float(other.lr) == pytest.approx(0.25, rel=1e-5)
    b.requires_grad_(True)
    other.step(closure)
    assert float(other.lr) == pytest.approx(1 / 9, rel=1e-5)


def test_a_state_may_be_loaded_between_thawing_and_the_next_step(pair):
    """As Accelerate's prepare() does, of a state of before."""
    a, b, closure = pair
    optimizer = exact([a, b], warmup_tol=1e-6)
    optimizer.step(closure)
    b.requires_grad_(True)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(1 / 9, rel=1e-5)


def test_groups_that_are_changed_from_outside_are_followed(pair):
    """As torch.optim follows them: Lightning's BaseFinetuning replaces optimizer.param_groups."""
    a, b, closure = pair
    b.requires_grad_(True)
    optimizer = exact([a], gain=0.5, warmup_tol=1e-6)
    optimizer.step(closure)
    optimizer.param_groups[0]["params"].append(b)
    optimizer.zero_grad()  # b has been given a gradient already
    optimizer.step(closure)
    assert float(optimizer.lr) == pytest.approx(0.5 / 9, rel=1e-5)
    settings = {n: v for n, v in optimizer.param_groups[0].items() if n != "params"}
    optimizer.param_groups = [{"params": [b], **settings, "lr": 0.0}, {"params": [a], **settings}]
    before = b.detach().clone(), a.detach().clone()
    optimizer.step(closure)
    assert torch.equal(b, before[0]) and not torch.equal(a, before[1])
    del optimizer.param_groups[0]
    b.requires_grad_(False)
    before = b.detach().clone(), a.detach().clone()
    optimizer.step(closure)
    assert torch.equal(b, before[0]) and not torch.equal(a, before[1])
    assert float(optimizer.tracker.h) == pytest.approx(4.0, rel=1e-3)


def test_freezing_all_of_what_is_measured_is_named(pair):
    a, _, closure = pair
    optimizer = exact([a], warmup_tol=1e-6)
    optimizer.step(closure)
    a.requires_grad_(False)
    before = a.detach().clone()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(closure)
    assert torch.equal(a, before)
    a.requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(a, before)


def test_a_thawed_parameter_that_cannot_be_tracked_is_named_and_nothing_changes(pair):
    a, _, closure = pair
    z = torch.ones(3, dtype=torch.complex64)
    optimizer = exact([a, z], warmup_tol=1e-6)
    optimizer.step(closure)
    h, before = optimizer.tracker.h, a.detach().clone()
    z.requires_grad_(True)
    with pytest.raises(TypeError, match="parameter 1.*complex64"):
        optimizer.step(closure)
    assert torch.equal(optimizer.tracker.h, h) and torch.equal(a, before)
    z.requires_grad_(False)
    optimizer.step(closure)
    with pytest.raises(TypeError, match="complex64"):
        optimizer.add_param_group({"params": [z.clone().requires_grad_()]})
    assert len(optimizer.param_groups) == 1
    optimizer.step(closure)


def test_a_resumed_run_that_thawed_goes_on_alike(pair):
    a, b, closure = pair
    optimizer = exact([a, b], gain=0.1, warmup_tol=1e-3)
    optimizer.step(closure)
    b.requires_grad_(True)
    optimizer.step(closure)
    saved, start = optimizer.state_dict(), [a.detach().clone(), b.detach().clone()]
    optimizer.step(closure)
    end = [a.detach().clone(), b.detach().clone()]
    for thawed_before in (True, False):
        with torch.no_grad():
            a.copy_(start[0]), b.copy_(start[1])
        b.requires_grad_(thawed_before)
        resumed = exact([a, b], gain=0.1, warmup_tol=1e-3)
        b.requires_grad_(True)
        resumed.load_state_dict(saved)
        resumed.step(closure)
        assert torch.equal(a, end[0]) and torch.equal(b, end[1])
    b.requires_grad_(False)
    other = exact([a, b], warmup_tol=1e-3)
    with pytest.raises(ValueError, match="2 parameters were measured, here they are 1") as error:
        other.load_state_dict(saved)
    assert len(str(error.value).splitlines()) <= 3 and other.param_groups[0]["lr"] == 1.0
    other.step(closure)


@pytest.mark.parametrize("every", [1, 3])
def test_without_a_warm_up_the_next_step_after_a_change_measures(pair, every):
    a, b, closure = pair
    optimizer = exact([a], every=every, warmup_iterations=0, max_lr=0.05, debug=False)
    for _ in range(2):
        optimizer.step(closure)
    b.requires_grad_(True)
    optimizer.add_param_group({"params": [b]})
    calls = []
    optimizer.step(lambda: calls.append(1) or closure())
    assert len(calls) == 2 and float(optimizer.tracker.h) > 0
    assert optimizer.tracker.calls == 3  # they go on


def test_a_log_and_hooks_follow_the_optimizers_tracker(pair, tmp_path):
    a, b, closure = pair
    optimizer = exact([a], gain=0.1, warmup_iterations=0)
    tracker, seen = optimizer.tracker, []
    tracker.register_step_hook(lambda t: seen.append(t is optimizer.tracker))
    with lyapcuda.CurvatureLog(tracker, tmp_path / "run.csv", every=2) as log:
        optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate's prepare() does
        for _ in range(3):
            optimizer.step(closure)
        b.requires_grad_(True)
        optimizer.add_param_group({"params": [b]})
        for _ in range(2):
            optimizer.step(closure)
        log.sync()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step(closure)
    assert seen == [True] * 6 and optimizer.tracker is tracker
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, 7))]
    assert tracker.history().step.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("how", ["lr", "gain", "positional"])
def test_lr_is_another_name_of_the_gain(how):
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], 0.5) if how == "positional" else exact([theta], **{how: 0.5})
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert float(optimizer.lr) == pytest.approx(0.125, rel=1e-5)
    group = {"params": [nn.Parameter(torch.ones(1))]}
    optimizer.add_param_group({**group, "lr" if how == "lr" else "gain": 0.25})
    assert optimizer.param_groups[1]["lr"] == 0.25
    optimizer.param_groups[1]["gain"] = 0.1
    with pytest.raises(ValueError, match='keeps it as "lr"'):
        optimizer.step(closure)


@pytest.mark.parametrize("k", [1, 2])
def test_capturable_takes_the_same_steps_to_the_bit(k):
    ends = []
    for capturable in (False, True):
        theta, closure = quadratic([3.7, 1.3, 0.7])
        optimizer = exact([theta], gain=0.1, k=k, momentum=0.3, capturable=capturable)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        for _ in range(4):
            optimizer.step(closure)
            scheduler.step()
        ends.append(theta.detach().clone())
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.7**4, rel=1e-15)
    assert torch.equal(*ends)
