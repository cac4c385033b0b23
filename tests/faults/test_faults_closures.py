"""Faults of the closure itself: it isn't a function of θ, throws, or steps its own tracker."""

import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits, bowl, state_of, steps, surroundings


def minibatches(count=3):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 1)
    return model, [torch.randn(8, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("period", [2, 3])
def test_debug_finds_a_closure_that_returns_another_minibatch(backend, k, period):
    model, batches = minibatches(period)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return model(batches[calls % period]).square().mean()

    tracker = lyapcuda.CurvatureTracker(model.parameters(), k=k, debug=True)
    steps(tracker, lambda: model(batches[0]).square().mean(), 3)
    before, state = surroundings(model.parameters()), state_of(tracker)
    for leave in (False, True):
        with pytest.raises(
            RuntimeError, match="closure: two evaluations at the same θ .*minibatch"
        ):
            tracker.step(closure, leave_grad=leave)
        assert surroundings(model.parameters()) == before and state_of(tracker) == state


def test_debug_lets_a_function_of_theta_pass_and_changes_no_value(backend):
    """Dropout from the global generators is replayed: no fault."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(16, 4)
    results = []
    for debug in (False, True):
        torch.manual_seed(1)
        tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=debug, model=model)
        twin = surroundings(model.parameters(), [model])
        steps(tracker, lambda: model(x).square().mean(), 4)
        assert surroundings(model.parameters(), [model]) == twin
        tracker.step(lambda: model(x).square().mean(), leave_grad=True)
        results.append((bits(tracker.state), bits([p.grad for p in model.parameters()])))
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
    assert results[0] == results[1]


def test_debug_finds_random_numbers_of_the_closures_own_and_gradients_that_come_and_go():
    theta = nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    tracker = lyapcuda.CurvatureTracker([theta], debug=True)
    with pytest.raises(RuntimeError, match="gave losses"):
        tracker.step(lambda: (theta * torch.rand(3, generator=generator)).sum())
    other, calls = nn.Parameter(torch.ones(3)), []
    tracker = lyapcuda.CurvatureTracker([theta, other], debug=True)

    def closure():
        calls.append(1)
        return theta.sum() + (other.sum() if len(calls) % 2 else 0.0)

    with pytest.raises(RuntimeError, match="gave some parameter a gradient once only"):
        tracker.step(closure)


@pytest.mark.parametrize("part", ["measure", "batches"])
def test_debug_looks_at_a_part_of_the_batch_too(part):
    model, batches = minibatches()
    calls = 0

    def changing(*batch):
        nonlocal calls
        calls += 1
        return model(batches[calls % 3]).square().mean()

    tracker = lyapcuda.CurvatureTracker(model.parameters(), debug=True)
    options = {"measure": changing} if part == "measure" else {"batches": [batches[0]]}
    closure = changing if part == "batches" else lambda: model(batches[0]).square().mean()
    with pytest.raises(RuntimeError, match="two evaluations at the same θ"):
        tracker.step(closure, leave_grad=True, **options)
    assert all(p.grad is None for p in model.parameters())


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{}, {"which": "BE", "k": 3, "momentum": 0.5}], ids=str)
def test_a_closure_that_throws_at_every_call_leaves_everything(backend, options, error):
    """At each of its k + 1 evaluations, before and after its backward()."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    x = torch.randn(12, 4)
    k = options.get("k", 1)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)

    def closure(stop_at=None, after=False):
        nonlocal calls
        calls += 1
        loss = model(x).square().mean()
        if calls == stop_at and not after:
            raise error
        loss.backward()
        if calls == stop_at:
            raise error
        return loss

    calls = 0
    steps(tracker, closure, 3)
    model(x).sum().backward()
    before, state = surroundings(model.parameters(), [model]), state_of(tracker)
    for stop_at in range(1, k + 2):
        for after in (False, True):
            for leave in (False, True):
                calls = 0
                with pytest.raises(error):
                    tracker.step(lambda a=stop_at, b=after: closure(a, b), leave_grad=leave)
                assert calls == stop_at
                assert surroundings(model.parameters(), [model]) == before
                assert state_of(tracker) == state


def test_a_closure_that_steps_its_own_tracker_is_an_error(backend):
    theta, closure = bowl()
    tracker = lyapcuda.CurvatureTracker([theta])
    tracker.step(closure)
    before, state = surroundings([theta]), state_of(tracker)

    def nested():
        tracker.step(closure)
        return closure()

    with pytest.raises(RuntimeError, match="tracker.step was called from within its own closure"):
        tracker.step(nested)
    assert surroundings([theta]) == before and state_of(tracker) == state
    tracker.step(closure)
    assert int(tracker.steps) == 2
