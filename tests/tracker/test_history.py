"""The tracker's history: written without waiting, read as columns, saved and gone on with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lyapcuda
from sync import no_waiting

MODES = [
    {},
    {"which": "SA", "momentum": 0.3, "beta": 0.05},
    {"estimate": "paper"},
    {"estimate": "schwarz", "k": 2},
    {"k": 3},
    {"k": 2, "momentum": 0.3},
    {"k": 2, "which": "BE"},
    {"k": 5, "which": "BE"},
]
NAMES = ("h", "h_ema", "interval", "rayleigh", "residual", "schwarz", "exponent", "beta")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(6)]
    return model, [lambda b=b: nn.functional.cross_entropy(model(b[0]), b[1]) for b in batches]


def same(a, b):
    return torch.equal(a.nan_to_num(1e300), b.nan_to_num(1e300)) and a.dtype == b.dtype


@pytest.mark.parametrize("options", MODES)
def test_rows_are_what_the_tracker_read_after_each_step(problem, options):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters(), every=2, **options)
    assert len(tracker.history()) == 0 and tracker.recorded == 0
    expected, losses = {name: [] for name in NAMES}, []
    for i, closure in enumerate(closures * 2):
        loss = tracker.step(closure)
        if i % 2 == 0:
            losses.append(loss.double())
            for name in NAMES:
                expected[name].append(getattr(tracker, name))
    history = tracker.history()
    assert history.step.tolist() == [1, 3, 5, 7, 9, 11] and history.step.dtype == torch.int64
    assert same(history.loss, torch.stack(losses)) and history.accepted.all()
    for name in NAMES:
        assert same(getattr(history, name), torch.stack(expected[name])), name
    assert len(history) == tracker.recorded == 6 and history.overwritten == 0


@pytest.mark.parametrize("how", ["leave_grad", "no trace", "measure", "batches", "attach"])
@pytest.mark.parametrize("options", MODES)
def test_no_step_waits_for_the_device(problem, options, how):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters(), every=2, history=2, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    if how == "attach":
        tracker.attach(optimizer)

    def step(closure):
        if how == "attach":
            optimizer.step(closure)
        elif how == "measure":
            tracker.step(closure, measure=closures[0], leave_grad=True)
        elif how == "batches":
            x = torch.ones(4, 6)
            batches = [x, x[:2]]
            tracker.step(lambda x: model(x).square().mean(), batches=batches, leave_grad=True)
        else:
            tracker.step(closure, leave_grad=how == "leave_grad")

    step(closures[0])  # chooses Δq from the parameters' size
    step(closures[0])
    with no_waiting():
        for closure in closures[:5]:
            step(closure)
        for name in NAMES:
            getattr(tracker, name)
    assert tracker.recorded == 4


def test_what_waits_is_caught():
    x = torch.ones(3)
    for waits in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x.tolist(),
        lambda: x.cpu(),
    ):
        with pytest.raises(AssertionError, match="waits"), no_waiting():
            waits()
    with no_waiting():
        x.index_copy(0, torch.tensor([1]), x[:1])
    assert float(x[0]) == 1.0


def test_a_full_buffer_keeps_the_newest(problem):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters(), history=4)
    full = lyapcuda.CurvatureTracker(model.parameters())
    for count, closure in enumerate(closures * 2, 1):
        tracker.step(closure)
        full.step(closure)
        history = tracker.history()
        assert history.step.tolist() == list(range(max(1, count - 3), count + 1))
        assert history.overwritten == max(0, count - 4)
        assert same(history.h, full.history().h[-4:])
    assert full.history(after=9).step.tolist() == [10, 11, 12]
    assert tracker.history(after=9).overwritten == 0 and len(tracker.history(after=9)) == 3
    assert tracker.history(after=2).overwritten == 6 and len(tracker.history(after=2)) == 4
    assert len(tracker.history(after=12)) == 0 and len(tracker.history(after=99)) == 0


def test_a_step_that_was_not_finite_is_marked(problem):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(closures[0])
    tracker.step(lambda: closures[0]() * math.nan)
    tracker.step(closures[0])
    history = tracker.history()
    assert history.accepted.tolist() == [True, False, True]
    assert history.loss.isnan().tolist() == [False, True, False]
    assert history.h[0] == history.h[1] != history.h[2]


def test_a_closure_that_raises_is_no_step(problem):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(closures[0])
    with pytest.raises(ZeroDivisionError):
        tracker.step(lambda: 1 / 0)
    tracker.step(closures[0])
    assert tracker.history().step.tolist() == [1, 2]


@pytest.mark.parametrize("options", MODES)
def test_a_saved_state_goes_on_bitwise_with_its_history(problem, options, tmp_path):
    model, closures = problem
    options = {**options, "every": 2, "history": 5}
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
    for closure in closures * 2 + closures[:1]:  # the next step is not measured
        tracker.step(closure)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    saved = torch.load(tmp_path / "tracker.pt", weights_only=True)
    resumed = lyapcuda.CurvatureTracker(model.parameters(), seed=99, **options)
    resumed.load_state_dict(saved)
    for closure in [None, *closures * 2]:
        if closure is not None:
            assert (tracker.step(closure) is None) == (resumed.step(closure) is None)
        a, b = tracker.history(), resumed.history()
        for name in (*NAMES, "step", "loss", "accepted"):
            assert same(getattr(a, name), getattr(b, name))
            assert name in ("step", "loss", "accepted") or same(
                getattr(tracker, name), getattr(resumed, name)
            )
        assert a.overwritten == b.overwritten
        pairs = [(tracker.vector(i), resumed.vector(i)) for i in range(tracker.k)]
        assert all(torch.equal(x, y) for v, w in pairs for x, y in zip(v, w, strict=True))


@pytest.mark.parametrize("capacity", [2, 5, 9])
def test_a_history_of_another_capacity(problem, capacity):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters(), history=5)
    for closure in closures + closures[:1]:
        tracker.step(closure)
    other = lyapcuda.CurvatureTracker(model.parameters(), history=capacity)
    other.load_state_dict(tracker.state_dict())
    kept = min(capacity, 5)
    assert other.history().step.tolist() == list(range(8 - kept, 8))
    assert other.history().overwritten == 7 - kept
    for closure in closures[:3]:
        other.step(closure)
    assert other.history().step.tolist() == list(range(11 - min(capacity, kept + 3), 11))


def test_without_a_history_nothing_is_recorded_and_no_value_changes(problem):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters(), history=0)
    kept = lyapcuda.CurvatureTracker(model.parameters())
    for closure in closures:
        tracker.step(closure)
        kept.step(closure)
    for what in (lambda: tracker.history(), lambda: tracker.recorded):
        with pytest.raises(RuntimeError, match="history=0"):
            what()
    assert torch.equal(tracker.h, kept.h)
    fresh = lyapcuda.CurvatureTracker(model.parameters())
    fresh.load_state_dict(tracker.state_dict())
    assert torch.equal(fresh.h, kept.h) and len(fresh.history()) == 0
    kept.load_state_dict(tracker.state_dict())  # there is none to go on with
    kept.step(closures[0])
    assert kept.history().step.tolist() == [7] and kept.history().overwritten == 0
    tracker.load_state_dict(kept.state_dict())
    with pytest.raises(ValueError, match="history=-1"):
        lyapcuda.CurvatureTracker(model.parameters(), history=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(3, 4).tolist()}, r"history of rows of \[4\] numbers"),
        ({"ks": [2]}, "history of rows"),
        ({"recorded": 0}, "1 rows, but 0 recorded"),
        ({"rows": torch.zeros(3, 4)}, "history's rows is a Tensor"),
        ({"rows": None}, "history's rows is a NoneType"),
        ({"clock": torch.zeros(2)}, "history's clock is"),
    ],
)
def test_a_history_that_does_not_fit_changes_nothing(problem, change, message):
    model, closures = problem
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    tracker.step(closures[0])
    saved = tracker.state_dict()
    saved["history"] = {**saved["history"], **change}
    other = lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(2):
        other.step(closures[1])
    before = other.h
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert torch.equal(other.h, before) and other.history().step.tolist() == [1, 2]


def test_columns_are_named_by_curvature():
    model = nn.Linear(4, 3)
    for options, names in [
        ({}, ["exponent", "beta", "h", "h_low", "h_high"]),
        ({"k": 2}, ["exponent_1", "beta", "h_0", "h_low_1", "h_high_0"]),
        ({"k": 2, "which": "BE"}, ["exponent_0", "beta_1", "h_1", "h_low_0", "h_high_1"]),
    ]:
        tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
        for _ in range(3):
            tracker.step(lambda: model(torch.ones(2, 4)).square().sum())
        columns = tracker.history().columns()
        assert list(columns)[:2] == ["step", "loss"] and set(names) <= set(columns)
        assert columns["step"] == [1, 2, 3] and columns["accepted"] == [True] * 3
        assert all(len(column) == 3 for column in columns.values())
        last = [columns[n][-1] for n in names if n.startswith("h_low")][0]
        low = tracker.interval.reshape(-1, 2)[int(names[3][-1]) if options else 0, 0]
        assert last == float(low)
