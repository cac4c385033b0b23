"""tracker.backward: the gradient that loss.backward() would have added, and a measurement."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case


def added(model: nn.Module, closure, times: int = 1) -> list[torch.Tensor]:
    """What loss.backward() leaves in .grad."""
    for _ in range(times):
        closure().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_is_that_of_loss_backward_and_adds_up(times, k):
    truth = case("tanh_mlp", seed=1)
    expected = added(truth.model, truth.closure, times)
    truth.model.zero_grad()
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), k)
    for _ in range(times):
        loss = tracker.backward(truth.closure)
    for p, gradient in zip(truth.model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    assert torch.equal(loss, truth.closure().detach()) and int(tracker.steps) == times


def test_it_measures_what_step_measures():
    truth = case("gelu_mlp", seed=2)
    trackers = [lyapcuda.CurvatureTracker(truth.model.parameters()) for _ in range(2)]
    for _ in range(5):
        trackers[0].step(truth.closure)
        trackers[1].backward(truth.closure)
    assert torch.equal(trackers[0].h, trackers[1].h)


def test_the_tensor_in_grad_stays_the_same_one():
    """An optimizer, or a flat buffer of the user's, may hold it."""
    truth = case("tanh_mlp", seed=1)
    added(truth.model, truth.closure)
    held = [p.grad for p in truth.model.parameters()]
    lyapcuda.CurvatureTracker(truth.model.parameters()).backward(truth.closure)
    assert all(p.grad is g for p, g in zip(truth.model.parameters(), held, strict=True))


def test_steps_that_do_not_measure_add_the_gradient_too():
    truth = case("tanh_mlp", seed=1)
    expected = added(truth.model, truth.closure, 4)
    truth.model.zero_grad()
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), every=3)
    losses = [tracker.backward(truth.closure) for _ in range(4)]
    assert int(tracker.steps) == 2 and len({float(loss) for loss in losses}) == 1
    for p, gradient in zip(truth.model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def test_an_accumulating_loop_with_clipping_trains_as_without():
    truth = case("tanh_mlp", seed=3)
    x = torch.randn(24, 6)

    def train(model: nn.Module, watch: bool) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        tracker = lyapcuda.CurvatureTracker(model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.split(8):
                closure = lambda part=part: model(part).square().mean() / 3  # noqa: E731
                tracker.backward(closure) if watch else closure().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return list(model.parameters())

    watched, plain = train(copy.deepcopy(truth.model), True), train(truth.model, False)
    assert all(map(torch.equal, watched, plain))


def test_the_average_over_micro_batches_is_added():
    model, x = nn.Linear(6, 2).double(), torch.randn(12, 6, dtype=torch.float64)
    loss_of = lambda batch: model(batch).square().mean()  # noqa: E731
    expected = added(model, lambda: loss_of(x), 2)
    model.zero_grad()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(2):
        tracker.backward(loss_of, batches=x.split(4))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_nothing_was_added(error):
    truth = case("tanh_mlp", seed=1)
    expected = added(truth.model, truth.closure)
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters())
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error("here")
        return truth.closure()

    with pytest.raises(error):
        tracker.backward(failing)
    for p, gradient in zip(truth.model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("older", [4, 5, 6, 7, 8])
def test_a_state_of_an_older_format_is_refused(older):
    theta = nn.Parameter(torch.ones(3))
    tracker = lyapcuda.CurvatureTracker([theta])
    tracker.step(lambda: theta.square().sum())
    with pytest.raises(ValueError, match=f"format {older}.*reads 9.*0.1.0"):
        tracker.load_state_dict({**tracker.state_dict(), "format": older})
