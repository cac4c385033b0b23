"""Curvature of a part of the minibatch beside the training gradient of the whole."""

from __future__ import annotations

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from fault_cases import bits
from noisy import Noisy, snapshot

cross_entropy = nn.functional.cross_entropy
MODES = ["measure", "batches"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 6, generator=generator)
    return x, torch.randint(0, 3, (32,), generator=generator)


def step_with(tracker, mode, loss_of, batch, fraction=0.25):
    """A step that measures on a part of the batch and leaves the gradient of all of it."""
    rest, part = lyapcuda.split_batch(batch, fraction)
    if mode == "batches":
        return tracker.step(loss_of, batches=[rest, part], leave_grad=True)
    return tracker.step(lambda: loss_of(batch), measure=lambda: loss_of(part), leave_grad=True)


def seeded():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_is_what_plain_evaluations_leave(batch, mode, own_backward):
    """Gradients, buffers and random states, of a net with dropout, BatchNorm and other noise."""

    def evaluations(model, tracker):
        def loss_of(batch):
            if own_backward:
                for p in model.parameters():
                    p.grad = None
            loss = cross_entropy(model(batch[0]), batch[1])
            if own_backward:
                loss.backward()
            return loss

        seeded()
        for _ in range(3):
            if tracker is not None:
                step_with(tracker, mode, loss_of, batch)
                continue
            parts = [batch] if mode == "measure" else lyapcuda.split_batch(batch, 0.25)
            total = []
            for part in parts:
                for p in model.parameters():
                    p.grad = None
                loss = loss_of(part)
                if not own_backward:
                    loss.backward()
                grads, weight = [p.grad for p in model.parameters()], len(part[1]) / 32
                total = [g * weight for g in grads] if not total else [
                    t.add_(g, alpha=weight) for t, g in zip(total, grads, strict=True)
                ]  # fmt: skip
            for p, g in zip(model.parameters(), total, strict=True):
                p.grad = g
        return snapshot(model)

    torch.manual_seed(0)
    plain, tracked = Noisy(), Noisy()
    tracked.load_state_dict(plain.state_dict())
    tracker = lyapcuda.CurvatureTracker(tracked.parameters())
    left, expected = evaluations(tracked, tracker), evaluations(plain, None)
    for i in (0, 2, 3, 4, 5):  # 1: the parameters' addresses
        assert left[i] == expected[i]
    assert int(tracker.steps) == 3


def test_averages_of_equal_micro_batches_are_bitwise_the_scaled_losses(batch):
    """What a loop that accumulates loss / 4 leaves in .grad."""
    model, parts = mlp(), list(zip(*(t.split(8) for t in batch), strict=True))
    total = 0.0
    for x, y in parts:
        loss = cross_entropy(model(x), y) / 4
        loss.backward()
        total += loss.detach()
    plain = [p.grad.clone() for p in model.parameters()]
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    loss = tracker.step(lambda b: cross_entropy(model(b[0]), b[1]), batches=parts, leave_grad=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert torch.equal(loss, total) and not loss.requires_grad


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 2, "which": "BE"}])
@pytest.mark.parametrize("mode", MODES)
def test_the_curvature_is_that_of_the_part(batch, mode, options):
    model = mlp()
    tracker, twin = (lyapcuda.CurvatureTracker(model.parameters(), **options) for _ in range(2))
    _, part = lyapcuda.split_batch(batch, 0.25)
    for _ in range(5):
        step_with(tracker, mode, lambda b: cross_entropy(model(b[0]), b[1]), batch)
        twin.step(lambda: cross_entropy(model(part[0]), part[1]))
    for name in ("h", "interval", "exponent", "beta"):
        assert torch.equal(getattr(tracker, name), getattr(twin, name))


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_evaluated(batch, k):
    model, sizes = mlp(), []

    def loss_of(batch):
        sizes.append(len(batch[1]))
        return cross_entropy(model(batch[0]), batch[1])

    for mode, measured, plain in [
        ("batches", [24] + [8] * (k + 1), [24, 8]),
        ("measure", [8] * (k + 1) + [32], [32]),
    ]:
        tracker = lyapcuda.CurvatureTracker(model.parameters(), k, every=2, debug=False)
        for expected in (measured, plain, measured):
            sizes.clear()
            assert tracker.due == (expected is measured)
            step_with(tracker, mode, loss_of, batch)
            assert sizes == expected
            assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_exception_anywhere_leaves_everything_as_it_was(batch, mode, every, k):
    torch.manual_seed(0)
    model = Noisy()
    calls, fails_at = 0, 10**6

    def loss_of(batch):
        nonlocal calls
        calls += 1
        loss = cross_entropy(model(batch[0]), batch[1])
        if calls == fails_at:
            raise KeyboardInterrupt
        loss.backward()
        return loss

    tracker = lyapcuda.CurvatureTracker([*model.parameters()][:2], k, every=every, momentum=0.5)
    twin_model = Noisy()
    seeded()
    for _ in range(every - 1 + 2):  # the next step measures with every=1, doesn't with every=2
        step_with(tracker, mode, loss_of, batch)
    if every == 2:
        step_with(tracker, mode, loss_of, batch)
    twin_model.load_state_dict(model.state_dict())
    before, saved = snapshot(model), tracker.state_dict()
    total = calls
    step_with(tracker, mode, loss_of, batch)
    total = calls - total  # how many evaluations the step has
    restored(model, before)
    tracker.load_state_dict(saved)
    grads = [p.grad for p in model.parameters()]
    before = snapshot(model)
    for where in range(1, total + 1):
        calls, fails_at = 0, where
        with pytest.raises(KeyboardInterrupt):
            step_with(tracker, mode, loss_of, batch)
        assert snapshot(model) == before
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert bits(tracker.state_dict()) == bits(saved)


def restored(model, before):
    """Puts a model's tensors and the random states back to a snapshot."""
    for tensor, value in zip([*model.parameters(), *model.buffers()], before[0], strict=True):
        dtype = {torch.float32: np.float32, torch.int64: np.int64}[tensor.dtype]
        array = np.frombuffer(value, dtype).copy().reshape(tensor.shape)
        tensor.data.copy_(torch.from_numpy(array))


def test_gradients_of_untracked_parameters_are_averaged_onto_what_was_there(batch):
    model = mlp()
    start = [torch.full_like(p, 2.0) for p in model[2].parameters()]
    for p, g in zip(model[2].parameters(), start, strict=True):
        p.grad = g
    x, y = batch
    expected = torch.autograd.grad(cross_entropy(model(x), y), list(model[2].parameters()))
    tracker = lyapcuda.CurvatureTracker(model[0].parameters(), model=model)
    step_with(tracker, "batches", lambda b: cross_entropy(model(b[0]), b[1]), batch)
    for p, g, e in zip(model[2].parameters(), start, expected, strict=True):
        assert p.grad is g
        torch.testing.assert_close(g, 2.0 + e)


def test_one_batch_is_a_plain_step(batch):
    model = mlp()
    tracker, twin = (lyapcuda.CurvatureTracker(model.parameters()) for _ in range(2))
    loss = tracker.step(
        lambda b: cross_entropy(model(b[0]), b[1]), batches=[batch], leave_grad=True
    )
    left = [p.grad for p in model.parameters()]
    plain = twin.step(lambda: cross_entropy(model(batch[0]), batch[1]), leave_grad=True)
    assert torch.equal(loss, plain) and torch.equal(tracker.h, twin.h)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), left, strict=True))


def test_a_part_that_is_not_finite_is_skipped_and_training_goes_on(batch):
    model = mlp()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    bad = lambda: cross_entropy(model(batch[0]), batch[1]) * float("nan")  # noqa: E731
    loss = tracker.step(
        lambda: cross_entropy(model(batch[0]), batch[1]), measure=bad, leave_grad=True
    )
    assert int(tracker.skipped) == 1 and bool(loss.isfinite())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_attached_with_a_part(batch):
    model, _ = mlp(), None
    twin_model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = torch.optim.SGD(twin_model.parameters(), lr=0.1)
    x, y = batch
    tracker, evaluated = lyapcuda.CurvatureTracker(model.parameters(), debug=False), []

    def part():
        evaluated.append(None)
        return cross_entropy(model(x[:8]), y[:8])

    tracker.attach(optimizer, measure=part)
    for _ in range(3):
        optimizer.step(lambda: cross_entropy(model(x), y))
        twin.zero_grad()
        cross_entropy(twin_model(x), y).backward()
        twin.step()
    assert len(evaluated) == 6 and int(tracker.steps) == 3
    pairs = zip(model.parameters(), twin_model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(measure=3, leave_grad=True), TypeError, "measure=3"),
        (dict(measure=lambda: None), ValueError, "leave_grad=False"),
        (dict(batches=[]), ValueError, "leave_grad=False"),
        (dict(batches=[], leave_grad=True), ValueError, "batches: empty"),
        (dict(batches=[torch.zeros(())], leave_grad=True), ValueError, "batches: found no tensor"),
        (dict(batches=torch.zeros(3), leave_grad=True), TypeError, "batches=Tensor"),
        (dict(batches=5, leave_grad=True), TypeError, "batches=int"),
        (dict(batches=[1], measure=print, leave_grad=True), ValueError, "one of them"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    model = mlp()
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(error, match=message):
        tracker.step(lambda *b: model(torch.ones(2, 6)).sum(), **options)
    assert int(tracker.steps) == 0 and all(p.grad is None for p in model.parameters())


Pair = namedtuple("Pair", "x y")


def test_split_batch_cuts_every_tensor_alike():
    x, y = torch.arange(20).reshape(10, 2), torch.arange(10)
    rest, part = lyapcuda.split_batch((x, y), 0.3)
    assert torch.equal(torch.cat([rest[0], part[0]]), x) and part[1].tolist() == [7, 8, 9]
    assert rest[0].data_ptr() == x.data_ptr()  # views
    assert [len(t) for t in lyapcuda.split_batch(x, 0.999)] == [1, 9]
    assert [len(t) for t in lyapcuda.split_batch(x, 0.001)] == [9, 1]
    rest, part = lyapcuda.split_batch({"in": [x], "out": Pair(x, y)}, 0.5)
    assert part["out"].y.tolist() == [5, 6, 7, 8, 9] and isinstance(rest["in"], list)
    for batch, fraction, message in [
        ((x, y), 1.0, "fraction=1.0"),
        ((x, y), 0, "fraction=0"),
        ((x, y[:4]), 0.5, r"a tensor of shape \(4,\) beside 10 samples"),
        (x[:1], 0.5, "1 sample can't be cut"),
        ((x, "label"), 0.5, "can't cut a str"),
        (3, 0.5, "batch: found no tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            lyapcuda.split_batch(batch, fraction)
