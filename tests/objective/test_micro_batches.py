"""Curvature of a part of the minibatch beside the training gradient of the whole."""

from __future__ import annotations

import dataclasses
import random
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
import weighted_losses
from fault_cases import bits
from lyapcuda.objective.splitting import batch_size
from noisy import Noisy, snapshot
from weighted_losses import ALL, COUNTS, SUMS, cut

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
        for number, expected in enumerate((measured, plain, measured)):
            sizes.clear()
            assert tracker.due == (expected is measured)
            step_with(tracker, mode, loss_of, batch)
            # Once, to see what the closure touches beside the parameters.
            look = [24] if mode == "batches" and number == 0 else []
            assert sizes == look + expected
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
        ((x, {1, 2}), 0.5, "can't cut a set"),
        ((x, ["a", "b"]), 0.5, "a list of 2 beside 10 samples"),
        (3, 0.5, "batch: found no tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            lyapcuda.split_batch(batch, fraction)


class Attributes(dict):
    """Whose keys are attributes, as many libraries' batches."""

    def __init__(self, *given):
        super().__init__(*given)
        self.__dict__ = self


class Encoding(UserDict):
    """As Hugging Face's BatchEncoding."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    names: list
    rate: float = 0.5


def defaults(given):
    return defaultdict(list, given)


@pytest.mark.parametrize(
    "make", [dict, OrderedDict, defaults, Attributes, Encoding, UserDict, types.MappingProxyType]
)
def test_a_mapping_keeps_its_type(make):
    x, names = torch.arange(20).reshape(10, 2), [f"{i}.png" for i in range(10)]
    whole = make({"x": x, "names": names, "kind": "train", "scale": torch.tensor(2.0), "no": None})
    for part, kept in zip(
        lyapcuda.split_batch(whole, 0.2), (slice(0, 8), slice(8, 10)), strict=True
    ):
        assert type(part) is type(whole) and torch.equal(part["x"], x[kept])
        assert part["names"] == names[kept] and part["kind"] == "train" and part["no"] is None
        if isinstance(whole, Attributes | Encoding):
            assert part.x is part["x"] and whole.x is x
    assert whole["x"] is x and getattr(part, "default_factory", list) is list


class Tensors(UserDict):
    """As a TensorDict, which cuts itself and takes tensors of its length alone."""

    def __init__(self, given, length):
        super().__init__(given)
        self.batch_size = torch.Size([length])

    def __getitem__(self, key):
        if not isinstance(key, slice):
            return super().__getitem__(key)
        values = {name: t[key] for name, t in self.data.items()}
        return Tensors(values, len(next(iter(values.values()))))


def test_what_cuts_itself_does():
    _, part = lyapcuda.split_batch(Tensors({"x": torch.arange(10)}, 10), 0.2)
    assert part.batch_size == (2,) and part["x"].tolist() == [8, 9]


def test_a_mapping_that_cant_be_made_is_named():
    class Fixed(UserDict):
        def __init__(self):
            super().__init__({"x": torch.arange(10)})

        def __setitem__(self, name, value):
            if name in self.data:
                raise TypeError("fixed")
            super().__setitem__(name, value)

    with pytest.raises(ValueError, match="batch: can't make a Fixed of a part of one"):
        lyapcuda.split_batch(Fixed())


def test_a_dataclass_keeps_its_type():
    whole = Record(torch.arange(10), list("abcdefghij"))
    rest, part = lyapcuda.split_batch(whole, 0.2)
    assert type(part) is Record and part.x.tolist() == [8, 9] and part.names == ["i", "j"]
    assert len(rest.x) == 8 and rest.rate == 0.5


def images(count, height=5):
    return [torch.zeros(3, height + i, 4) for i in range(count)]


def boxes(count):
    return [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)} for _ in range(count)]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((images(5), boxes(5)), 5),
        ([images(5), boxes(5)], 5),
        ({"images": images(5), "targets": boxes(5)}, 5),
        (([torch.zeros(3, 4, 4)] * 2, boxes(2)), 2),  # images of one shape
        ((images(5), torch.zeros(5)), 5),
        ([torch.zeros(7, 2), torch.zeros(7)], 7),  # as of a DataLoader
        ({"in": [torch.zeros(7, 2), torch.zeros(7, 3)], "out": torch.zeros(7)}, 7),
        ((torch.zeros(9, 7, 2), torch.zeros(7)), 9),  # sequences first: can't be told
    ],
)
def test_the_size_of_a_batch(batch, size):
    assert batch_size(batch, "batch") == size


def test_lists_of_images_are_cut():
    rest, part = lyapcuda.split_batch((images(5), boxes(5)), 0.4)
    assert [len(members) for members in (*rest, *part)] == [3, 3, 2, 2]
    assert part[0][1].shape == (3, 9, 4)


@pytest.fixture
def padded():
    return weighted_losses.whole()


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def left(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_that_of_all_batches_at_once(padded, name, own_backward):
    model, loss = weighted_losses.net(), ALL[name]

    def closure(b):
        value = loss(model, b)
        if own_backward:
            value.backward()
        return float(value.detach()) if own_backward else value

    tracker = lyapcuda.CurvatureTracker(model.parameters())
    value = tracker.step(closure, batches=cut(padded), leave_grad=True)
    expected = loss(model, padded)
    torch.testing.assert_close(float(value), float(expected.detach()), rtol=1e-6, atol=0)
    expected = gradient(model, expected)
    assert float((left(model) - expected).norm() / expected.norm()) < 1e-7
    assert int(tracker.steps) == 1 and int(tracker.skipped) == 0


@pytest.mark.parametrize("name", ["tokens", "masked", "selected"])
@pytest.mark.parametrize("sizes", [None, [3, 0, 1], lambda b: (b["labels"] != -100).sum()])
@pytest.mark.parametrize("at", [0, 1])
def test_a_micro_batch_of_padding_counts_nothing(padded, sizes, name, at):
    model, loss = weighted_losses.net(), COUNTS[name]
    first, _, last = cut(padded)
    padding = {**first, "labels": torch.full_like(first["labels"], -100)}
    batches = [first, last]
    batches.insert(at, padding)
    if isinstance(sizes, list) and at == 0:
        sizes = [0, 3, 1]
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    value = tracker.backward(lambda b: loss(model, b), batches=batches, sizes=sizes)
    weights = torch.tensor([18.0, 4]) if not isinstance(sizes, list) else torch.tensor([3.0, 1])
    both = torch.stack([loss(model, b) for b in (first, last)])
    expected = (both * weights).sum() / weights.sum()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(left(model), gradient(model, expected))
    assert int(tracker.skipped) == 0


@pytest.mark.parametrize("name", ["tokens", "masked", "tokens, summed"])
def test_exact_measurements_over_batches(padded, name):
    model, loss = weighted_losses.net(), ALL[name]
    tracker, twin = (lyapcuda.CurvatureTracker(model.parameters(), mode="exact") for _ in range(2))
    last = {name: t[:2] for name, t in padded.items()}
    for _ in range(3):
        tracker.step(lambda b: loss(model, b), batches=[last, last], leave_grad=True)
        twin.step(lambda: loss(model, last) * (2 if name in SUMS else 1))
    torch.testing.assert_close(tracker.h, twin.h)


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("sizes", [None, "sum"])
def test_the_curvature_of_a_sum_is_that_of_all_of_it(padded, sizes, own_backward):
    """So that the rate and the edge belong to the gradient that is left."""
    model, whole = weighted_losses.net(), lyapcuda.CurvatureTracker
    last = {name: t[:2] for name, t in padded.items()}
    loss = SUMS["tokens, summed"]

    def closure(b):
        value = loss(model, b)
        if own_backward:
            value.backward()
        return value

    tracker, twin = (whole(model.parameters()) for _ in range(2))
    for _ in range(3):
        tracker.step(closure, batches=[last] * 4, sizes=sizes, leave_grad=True)
        twin.step(lambda: 4 * loss(model, last))
    torch.testing.assert_close(tracker.h, twin.h)
    torch.testing.assert_close(left(model), 4 * gradient(model, loss(model, last)))


@pytest.mark.filterwarnings("ignore:h0 was not stable")
def test_lyapunov_sgd_takes_the_same_steps_on_a_sum_as_on_a_mean(padded):
    parts = cut(padded, ((0, 2), (2, 4), (4, 6)))
    ends = []
    for name, sizes in (("samples", None), ("samples", "sum")):
        model = weighted_losses.net()
        optimizer = lyapcuda.LyapunovSGD(model.parameters(), warmup_iterations=10)
        for _ in range(3):
            optimizer.step(lambda b: ALL[name](model, b), batches=parts, sizes=sizes)  # noqa: B023
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_not_finite_decides_nothing(padded):
    model, scale = weighted_losses.net(), [float("inf")]

    def closure(b):
        return SUMS["half of squares"](model, b) * scale[0]

    tracker = lyapcuda.CurvatureTracker(model.parameters())
    parts = cut(padded)
    tracker.step(closure, batches=parts, leave_grad=True)
    assert int(tracker.skipped) == 1
    scale[0] = 1.0
    tracker.step(closure, batches=parts, leave_grad=True)
    expected = gradient(model, closure(padded))
    torch.testing.assert_close(left(model), expected)
