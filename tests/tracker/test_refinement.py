"""CurvatureTracker(tol=): further gradients of a step, what they bring, what they leave alone."""

from __future__ import annotations

import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lyapcuda
from classifiers import classifier, mlp
from fault_cases import bits, bowl, state_of, surroundings
from lyapcuda.dynamics import refinement
from nets import case
from noisy import Noisy
from truths import wanted

#: A tolerance that no step meets: all further gradients are taken.
NEVER = 1e-9
Tracker = lyapcuda.CurvatureTracker


class Counted:
    """A closure that counts its calls, and can be told to fail at one of them."""

    def __init__(self, closure, own_backward: bool = False) -> None:
        self.closure, self.own_backward = closure, own_backward
        self.calls, self.fail_at, self.fail, self.late = 0, None, None, False

    def __call__(self):
        self.calls += 1
        loss, fails = self.closure(), self.calls == self.fail_at
        if fails and isinstance(self.fail, float):
            return loss * self.fail
        if fails and not self.late:
            raise self.fail
        if self.own_backward:
            loss.backward()
        if fails:
            raise self.fail
        return loss


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "k", "momentum"),
    [("LA", 1, 0.0), ("SA", 1, 0.0), ("BE", 3, 0.0), ("LA", 2, 0.5), ("SA", 2, 0.5)],
)
def test_values_are_within_the_tolerance_from_the_first_step_on(which, k, momentum):
    """Within tol·|h| of an exact eigenvalue lies every Ritz value of so small a residual, and from
    a random vector no eigenvalue is missed. Of a residual r, the value is off by r² over a gap.
    """
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    options = {"which": which, "momentum": momentum, "tol": 1e-3, "iterations": 60}
    tracker = Tracker(truth.model.parameters(), k, **options)
    exact = wanted(truth.eigenvalues, k, which).reshape(-1)
    for step in range(4):
        tracker.step(truth.closure)
        h, residual = tracker.h.reshape(-1), tracker.residual.reshape(-1)
        # The first Δq is one for any loss; from the second on it is one for a smooth loss.
        torch.testing.assert_close(h, exact, rtol=1e-3 if step else 1e-2, atol=0)
        assert (residual <= 1.01e-3 * h.abs()).all()
        error = tracker.h_error.reshape(-1)
        assert ((h - exact).abs() <= error).all() and (error < 0.06 * h.abs()).all()
    assert int(tracker.skipped.sum()) == 0


def test_weight_decay_is_a_groups_own():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    matrix = half + half.T
    a, b = (nn.Parameter(torch.ones(8, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 0.5}, {"params": [b], "weight_decay": 5.0}]
    tracker = Tracker(groups, 2, which="BE", tol=1e-4, iterations=14)

    def closure():
        x = torch.cat([a, b])
        return 0.5 * (x @ matrix @ x)

    for _ in range(3):
        tracker.step(closure)
    decay = torch.tensor([0.5] * 8 + [5.0] * 8, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(matrix + decay.diag())[[-1, 0]]
    torch.testing.assert_close(tracker.h, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 2])
def test_values_in_float32(k):
    truth = case("conv", seed=1)
    tracker = Tracker(truth.model.parameters(), k, tol=0.02, iterations=6)
    for _ in range(3):
        tracker.step(truth.closure)
    exact = wanted(truth.eigenvalues, k, "LA").reshape(-1)
    torch.testing.assert_close(tracker.h.reshape(-1), exact, rtol=0.02, atol=0)
    assert tracker.gradients > 3 * k


@pytest.mark.parametrize("k", [1, 2])
def test_values_of_16_bit_parameters(k):
    """Their Δq can't be small, so each side of θ is off by 10 to 20 % whatever the residual: the
    mean of two sides isn't, the interval has both, and the error says so.
    """
    truth = case("conv", seed=1, dtype=torch.bfloat16)
    tracker = Tracker(truth.model.parameters(), k, tol=0.05, iterations=6)
    sides = []
    for _ in range(6):
        tracker.step(truth.closure)
        sides.append(tracker.h.reshape(-1))
    exact = wanted(truth.eigenvalues, k, "LA").reshape(-1)
    torch.testing.assert_close(sum(sides[-4:]) / 4, exact, rtol=0.1, atol=0)
    assert (tracker.residual.reshape(-1) < 0.12 * exact).all()  # without: 0.85, and 0.3 by now
    low, high = tracker.interval.reshape(-1, 2).unbind(1)
    assert bool(((low < exact) & (exact < high)).all())
    assert ((sides[-1] - exact).abs() <= tracker.h_error.reshape(-1)).all()


def test_two_types_in_one_model():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(6, dtype=torch.float64))
    c = torch.linspace(1, 6, 6, dtype=torch.float64)
    tracker = Tracker([a, b], 2, tol=1e-3, iterations=8)
    loss = lambda: (a.double() ** 2).sum() * 2.5 + (c * b * b).sum() / 2  # noqa: E731
    tracker.step(loss)
    torch.testing.assert_close(tracker.h, torch.tensor([6.0, 5.0]).double(), rtol=1e-4, atol=0)


def test_exact_products_are_of_the_hessian_at_theta_of_a_relu_net():
    truth = classifier(lambda: mlp(F.relu), dtype=torch.float64)
    options = {"mode": "exact", "tol": 1e-4, "iterations": 40, "debug": False}
    tracker = Tracker(truth.model.parameters(), 2, which="BE", **options)
    closure = Counted(truth.closure)
    tracker.step(closure)
    exact = wanted(truth.eigenvalues, 2, "BE")
    torch.testing.assert_close(tracker.h, exact, rtol=1e-4, atol=0)
    assert closure.calls == 1 and 10 < tracker.gradients <= 42


def test_on_kinks_a_hopeless_step_takes_no_further_gradient():
    """Of a random q hardly anything is known: further differences would lead to the curvature at
    the scale Δq, which is larger. Later on they are taken.
    """
    truth = classifier(lambda: mlp(F.relu), dtype=torch.float64)
    tracker = Tracker(truth.model.parameters(), tol=NEVER, iterations=2, debug=False)
    closure, took = Counted(truth.closure), []
    for _ in range(12):
        before = tracker.gradients
        tracker.step(closure)
        took.append((float(tracker.residual / tracker.h.abs()), tracker.gradients - before))
    assert took[0][0] > 0.6 and took[0][1] == 1
    assert max(count for _, count in took) > 1
    assert all(share < 0.6 for share, count in took if count > 1)
    assert tracker.gradients == closure.calls - 12


# --- how many gradients --------------------------------------------------------------------------


def test_gradients_are_those_that_the_closure_was_called_for():
    truth = case("tanh_mlp", seed=1)
    closure = Counted(truth.closure)
    tracker = Tracker(truth.model.parameters(), 2, tol=0.01, iterations=3, debug=False)
    assert tracker.gradients == 0
    optimizer = torch.optim.SGD(truth.model.parameters(), lr=0.2)
    counts = []
    for _ in range(25):
        tracker.step(closure, leave_grad=True)
        optimizer.step()
        counts.append(tracker.gradients)
        assert tracker.gradients == closure.calls - int(tracker.steps)
        settled = bool((tracker.residual <= 0.01 * tracker.h.abs()).all())
        further = counts[-1] - 2 - (counts[-2] if len(counts) > 1 else 0)
        assert 0 <= further <= 3
        assert settled or further == 3  # else one more would have been taken
    assert counts[0] == 5  # from random vectors


def test_a_step_whose_residual_is_small_takes_none_but_the_gradient_at_every_fifth():
    truth = case("tanh_mlp", seed=1)
    tracker = Tracker(truth.model.parameters(), tol=0.05, iterations=20)
    plain = Tracker(truth.model.parameters())
    tracker.step(truth.closure)
    assert tracker.gradients > 1
    for each in (tracker, plain):
        for _ in range(30):
            each.step(truth.closure)
    before, closure = tracker.gradients, Counted(truth.closure)
    for _ in range(5):
        tracker.step(closure)
    assert tracker.gradients == before + 5 + 1 and closure.calls == 10 + 1
    assert float(tracker.residual) <= 0.05 * float(tracker.h)
    assert plain.gradients == 30
    # A span that has all of the parameters has nothing to add.
    theta, loss = bowl([3.0, 1.0])
    small = Tracker([theta], tol=1e-6, iterations=1)
    for _ in range(3):
        small.step(loss)
    assert float(small.h) == pytest.approx(3.0, rel=1e-6) and small.gradients <= 5


# --- training ------------------------------------------------------------------------------------


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def plain_backward(model, optimizer, batch, tracker):
    optimizer.zero_grad()
    if tracker is None:
        loss_of(model, batch).backward()
    else:
        tracker.backward(lambda: loss_of(model, batch))
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def added_onto_gradients(model, optimizer, batch, tracker):
    optimizer.zero_grad()
    (0.5 * loss_of(model, (batch[0][:8], batch[1][:8]))).backward()
    rest = (batch[0][8:], batch[1][8:])
    if tracker is None:
        loss_of(model, rest).backward()
    else:
        tracker.backward(lambda: loss_of(model, rest))
    optimizer.step()


def without_a_trace(model, optimizer, batch, tracker):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    if tracker is not None:
        tracker.step(lambda: loss_of(model, batch))
    optimizer.step()


def measured_part(model, optimizer, batch, tracker):
    optimizer.zero_grad()
    if tracker is None:
        loss_of(model, batch).backward()
    else:
        part = (batch[0][:12], batch[1][:12])
        tracker.backward(lambda: loss_of(model, batch), measure=lambda: loss_of(model, part))
    optimizer.step()


def micro_batches(model, optimizer, batch, tracker):
    optimizer.zero_grad()
    parts = lyapcuda.split_batch(batch, 0.5)
    if tracker is None:
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for x, y in parts:
            optimizer.zero_grad()
            loss_of(model, (x, y)).backward()
            for p, total in zip(model.parameters(), sums, strict=True):
                total.add_(p.grad, alpha=len(x) / len(batch[0]))
                p.grad = total
    else:
        tracker.backward(partial(loss_of, model), batches=parts)
    optimizer.step()


def attached(model, optimizer, batch, tracker):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def own_buffers(model, optimizer, batch, tracker):
    """The closure writes gradients into memory of its own, the same every time."""
    if not hasattr(model, "kept"):
        model.kept = [torch.zeros_like(p) for p in model.parameters()]

    def closure():
        loss = loss_of(model, batch)
        found = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, buffer, gradient in zip(model.parameters(), model.kept, found, strict=True):
            parameter.grad = buffer.copy_(gradient)
        return loss

    if tracker is None:
        closure()
    else:
        tracker.step(closure, leave_grad=True)
    optimizer.step()


LOOPS = {
    plain_backward: {},
    added_onto_gradients: {"k": 2},
    without_a_trace: {"which": "BE", "k": 2},
    measured_part: {},
    micro_batches: {"every": 2},
    attached: {"momentum": 0.5},
    own_buffers: {"k": 2},
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("tracked", ["all", "some"])
def test_training_is_bitwise_what_it_is_without(loop, tracked):
    """Dropout, BatchNorm, and random numbers of torch, NumPy and Python; other parameters too."""
    torch.manual_seed(0)
    start = Noisy()
    batches = [(torch.randn(24, 6), torch.randint(0, 3, (24,))) for _ in range(5)]

    def train(watched: bool):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(1)
        model, seen = copy.deepcopy(start), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker, further = None, []
        if watched:
            parameters = list(model.parameters())[tracked == "some" :]
            tracker = Tracker(parameters, tol=NEVER, iterations=2, **LOOPS[loop])
            if loop is attached:
                tracker.attach(optimizer)
        for batch in batches:
            loop(model, optimizer, batch, tracker)
            seen.append(surroundings(model.parameters(), [model])[0::2])
            if watched:
                further.append(tracker.separations.further)
        # Of a closure that autograd.grad differentiates, no graph is seen: it may have kinks.
        assert not watched or (max if loop is own_buffers else min)(further) == 2
        return seen, surroundings([])[3:]

    assert train(True) == train(False)


# --- faults --------------------------------------------------------------------------------------


def noisy_problem(own_backward: bool, **options):
    """A net with gradients in place, its tracker after three steps, and the closure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))
    x = torch.randn(12, 4)
    model(x).square().mean().backward()
    tracker = Tracker(model.parameters(), tol=NEVER, iterations=3, **options)
    closure = Counted(lambda: model(x).square().mean(), own_backward)
    for _ in range(3):
        tracker.step(closure)
    closure.calls = 0
    return model, tracker, closure


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, KeyboardInterrupt),
        ({"momentum": 0.5}, Stop),
        ({"which": "BE", "k": 3}, KeyboardInterrupt),
        ({"estimate": "growth"}, Stop),
    ],
    ids=str,
)
def test_a_closure_that_throws_at_a_further_copy_leaves_everything(options, error):
    model, tracker, closure = noisy_problem(True, **options)
    before, state = surroundings(model.parameters(), [model]), state_of(tracker)
    taken = tracker.gradients
    for number in range(3):  # of the further copies
        for late in (False, True):
            closure.calls, closure.late = 0, late
            closure.fail_at, closure.fail = tracker.k + 2 + number, error()
            with pytest.raises(error):
                tracker.step(closure, leave_grad=late)
            assert closure.calls == closure.fail_at
            assert surroundings(model.parameters(), [model]) == before
            assert state_of(tracker) == state
    closure.fail_at = None
    other = noisy_problem(True, **options)[1:]
    for each, loss in ((tracker, closure), other):
        each.step(loss)
    assert state_of(tracker) == state_of(other[0])
    assert tracker.gradients == taken + tracker.k + 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", [1, 2])
def test_a_further_copy_that_is_not_finite_is_left_out(value, number):
    """The columns before it count, and the step does."""
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    closure = Counted(truth.closure)
    closure.fail_at, closure.fail = 2 + number, value
    found = Tracker(truth.model.parameters(), tol=NEVER, iterations=3, debug=False)
    tol = None if number == 1 else NEVER
    less = Tracker(truth.model.parameters(), tol=tol, iterations=1)
    found.step(closure)
    less.step(truth.closure)
    assert found.gradients == 1 + number == closure.calls - 1
    assert torch.equal(found.h, less.h) and torch.equal(found.h_error, less.h_error)
    assert (int(found.steps), int(found.skipped)) == (1, 0)
    found.step(truth.closure)
    assert found.gradients == 1 + number + 4 and bool(found.h.isfinite())


def test_a_step_that_is_not_finite_is_skipped_and_takes_none():
    truth = case("tanh_mlp", seed=1)
    tracker = Tracker(truth.model.parameters(), tol=NEVER, iterations=2)
    tracker.step(truth.closure)
    names = ("h", "error", "center", "width", "first", "refined")
    before = [tracker.separations.scalars(name) for name in names]
    assert before[-1] == 1.0 and before[-2] > 0.5
    tracker.step(lambda: truth.closure() * math.nan)
    assert int(tracker.skipped) == 1 and tracker.gradients == 4
    assert bits([tracker.separations.scalars(name) for name in names]) == bits(before)


# --- saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 2, "momentum": 0.5}, {"momentum": 0.5}, {"which": "BE", "k": 2}, {"mode": "exact"}],
    ids=str,
)
def test_a_saved_state_goes_on_bitwise(options):
    truth = case("tanh_mlp", seed=1)
    optimizer = torch.optim.SGD(truth.model.parameters(), lr=0.1)
    make = partial(Tracker, list(truth.model.parameters()), tol=0.02, iterations=2, **options)
    tracker, other = make(), make()
    for step in range(8):
        if step == 4:
            other.load_state_dict(copy.deepcopy(tracker.state_dict()))
            assert state_of(other) == state_of(tracker) and tracker.gradients > 4 * tracker.k
        if step >= 4:
            other.step(truth.closure)
        tracker.step(truth.closure, leave_grad=True)
        optimizer.step()
    assert bits([other.h, other.h_error, other.rayleigh, other.gradients]) == bits(
        [tracker.h, tracker.h_error, tracker.rayleigh, tracker.gradients]
    )


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [0, 1, -1, math.nan, math.inf, "a", True, [0.1]])
def test_a_tolerance_is_between_0_and_1(tol):
    with pytest.raises(ValueError, match=r"tol=.*: expected a number in \(0, 1\)"):
        Tracker([nn.Parameter(torch.ones(3))], tol=tol)


@pytest.mark.parametrize("iterations", [0, -1, 1.5, math.nan, "2", True, None])
def test_iterations_are_a_whole_number(iterations):
    for tol in (None, 0.1):
        with pytest.raises(ValueError, match="iterations=.*: expected a whole number of at least"):
            Tracker([nn.Parameter(torch.ones(3))], tol=tol, iterations=iterations)


@pytest.mark.parametrize(("k", "n", "most"), [(1, 3, 2), (2, 3, 1), (3, 3, 0), (2, 1000, 126)])
def test_no_more_columns_than_the_ops_or_the_parameters_have(k, n, most):
    theta = nn.Parameter(torch.ones(n))
    with pytest.raises(ValueError, match=f"iterations={most + 1}: at most {most} beside k={k} of"):
        Tracker([theta], k, tol=0.1, iterations=most + 1)
    if most:
        Tracker([theta], k, tol=0.1, iterations=most)
    Tracker([theta], k, iterations=most + 1)  # of no account without a tolerance


def test_columns_that_memory_has_no_room_for(monkeypatch):
    theta = nn.Parameter(torch.ones(1000))
    vector = 4 * Tracker([theta]).layout.groups[0].length
    monkeypatch.setattr(refinement, "free_bytes", lambda device: 2 * (1 + 3) * vector)
    Tracker([theta], tol=0.1, iterations=3)
    with pytest.raises(ValueError, match="iterations=4: with k=1 they need .* GB on cpu, where"):
        Tracker([theta], tol=0.1, iterations=4)
    monkeypatch.setattr(refinement, "free_bytes", lambda device: None)
    Tracker([theta], tol=0.1, iterations=4)


def test_algorithm_1_as_printed_takes_none():
    with pytest.raises(ValueError, match="tol: .*paper.* one gradient a step"):
        Tracker([nn.Parameter(torch.ones(3))], tol=0.1, estimate="paper")
