"""Logs of a tracker: every measurement once, in files that a crash leaves whole."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys

import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.files import LineFile
from sync import no_waiting


class Problem:
    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(6)]
        self.closures = [lambda b=b: self.loss(*b) for b in batches]

    def loss(self, x, y):
        return nn.functional.cross_entropy(self.model(x), y)

    def tracker(self, **options):
        return lyapcuda.CurvatureTracker(self.model.parameters(), **options)

    def take(self, tracker, count, start=0):
        for i in range(start, start + count):
            tracker.step(self.closures[i % 6])


@pytest.fixture
def problem():
    return Problem()


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Memory(lyapcuda.log.Writer):
    """Keeps rows; raises where it is told to."""

    def __init__(self):
        self.rows, self.blocks, self.broken = [], [], False

    def write(self, rows):
        if self.broken:
            raise OSError("disk full")
        self.blocks.append(len(rows))
        self.rows += rows


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 2, "which": "BE", "every": 2}])
def test_files_hold_every_measurement_exactly(problem, options, tmp_path):
    tracker, rate = problem.tracker(**options), 0.5
    paths = tmp_path / "run.csv", tmp_path / "run.jsonl"
    values = {"lr": lambda: rate, "twice": lambda: tracker.h.sum() * 2}
    with lyapcuda.CurvatureLog(tracker, *map(str, paths), every=4, values=values):
        for i in range(11):
            rate = 0.5 / (i + 1)
            problem.take(tracker, 1, i)
    columns = tracker.history().columns()
    rows = {paths[0]: read_csv(paths[0]), paths[1]: read_jsonl(paths[1])}
    for found in rows.values():
        assert list(found[0]) == [*columns, "lr", "twice"]
        for name, column in columns.items():
            values = [math.nan if row[name] is None else float(row[name]) for row in found]
            assert values == pytest.approx([float(v) for v in column], rel=0, abs=0, nan_ok=True)
        steps = columns["step"]
        assert [float(row["lr"]) for row in found] == [0.5 / step for step in steps]
        twice = 2 * tracker.history().h.reshape(len(steps), -1).sum(1)
        assert [float(row["twice"]) for row in found] == pytest.approx(twice.tolist(), rel=1e-15)


def test_a_log_reads_back_only_every_so_many_steps(problem):
    tracker, memory = problem.tracker(), Memory()
    log = lyapcuda.CurvatureLog(tracker, memory, every=5, values={"h2": lambda: tracker.h * 2})
    problem.take(tracker, 4)
    with no_waiting():
        with pytest.raises(AssertionError, match="waits"):
            problem.take(tracker, 1, 4)  # the fifth
    log.flush()
    with no_waiting():
        problem.take(tracker, 4, 5)
    assert memory.blocks == [5]
    problem.take(tracker, 2, 9)
    assert memory.blocks == [5, 5]
    log.close()
    assert memory.blocks == [5, 5, 1] and [r["step"] for r in memory.rows] == list(range(1, 12))
    problem.take(tracker, 6)
    log.close()
    assert len(memory.rows) == 11


def test_attached_with_a_schedule_that_it_does_not_disturb(problem, tmp_path):
    def train(logged):
        again = Problem()
        optimizer = torch.optim.SGD(again.model.parameters(), lr=0.4, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        tracker, rates, memory = again.tracker(), [], Memory()
        if logged:
            tracker.attach(optimizer)
            rate = {"lr": lambda: optimizer.param_groups[0]["lr"]}
            log = lyapcuda.CurvatureLog(tracker, memory, tmp_path / "a.csv", every=3, values=rate)
        for closure in again.closures:

            def evaluate(closure=closure):
                optimizer.zero_grad()
                loss = closure()
                loss.backward()
                return loss

            optimizer.step(evaluate)
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        if logged:
            log.close()
            assert [row["lr"] for row in memory.rows] == rates
            assert [row["step"] for row in memory.rows] == [1, 2, 3, 4, 5, 6]
        return rates, [p.detach().clone() for p in again.model.parameters()]

    (rates, plain), (logged_rates, logged) = train(False), train(True)
    assert rates == logged_rates
    assert all(torch.equal(a, b) for a, b in zip(plain, logged, strict=True))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("flushed", [True, False])
def test_a_run_that_was_broken_off_ends_with_the_file_of_a_whole_one(
    problem, suffix, flushed, tmp_path
):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"run.{suffix}"
    tracker = problem.tracker(every=2)
    with lyapcuda.CurvatureLog(tracker, whole, every=3):
        problem.take(tracker, 21)

    tracker = problem.tracker(every=2)
    log = lyapcuda.CurvatureLog(tracker, path, every=3)
    problem.take(tracker, 10)
    if flushed:
        log.sync()
    saved = tracker.state_dict()  # a checkpoint at step 10; the file may be behind it
    problem.take(tracker, 8, 10)  # and is past it when the run ends
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1][:9])  # in the middle of a line
    resumed = problem.tracker(every=2)
    resumed.load_state_dict(saved)
    with lyapcuda.CurvatureLog(resumed, path, every=3, mode="a"):
        problem.take(resumed, 11, 10)
    assert path.read_text() == whole.read_text()


def test_a_new_log_writes_what_the_history_holds_already(problem, tmp_path):
    tracker = problem.tracker(history=8)
    problem.take(tracker, 10)
    path = tmp_path / "a.csv"
    with lyapcuda.CurvatureLog(tracker, path, every=8, values={"lr": lambda: 0.1}):
        problem.take(tracker, 2)
    rows = read_csv(path)
    assert [int(row["step"]) for row in rows] == list(range(5, 13))
    assert [row["lr"] for row in rows] == ["nan"] * 6 + ["0.1"] * 2


def test_files_that_are_there_are_kept_replaced_or_gone_on_with(problem, tmp_path):
    tracker, path, other = problem.tracker(), tmp_path / "a.csv", tmp_path / "b.jsonl"
    problem.take(tracker, 3)
    path.write_text("mine\n")
    for mode, error, message in [
        ("x", FileExistsError, "a.csv: exists"),
        ("a", ValueError, r"a.csv: line 1: columns \['mine'\]"),
    ]:
        with pytest.raises(error, match=message):
            lyapcuda.CurvatureLog(tracker, other, path, mode=mode)
        assert path.read_text() == "mine\n" and not other.exists()
    with lyapcuda.CurvatureLog(tracker, path, other, mode="w"):
        pass
    assert len(read_csv(path)) == len(read_jsonl(other)) == 3
    lines = path.read_text().splitlines()
    for change, message in [
        ([lines[0], lines[2], lines[1]], "line 3: step 1 after 2"),
        ([lines[0], lines[1] + ",7"], "line 2: .* values, expected"),
        ([lines[0], "x" + lines[1]], "line 2: invalid literal"),
    ]:
        path.write_text("\n".join([*change, ""]))
        with pytest.raises(ValueError, match=message):
            lyapcuda.CurvatureLog(tracker, path, mode="a")
        assert path.read_text().splitlines() == change
    other.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1: other names"):
        lyapcuda.CurvatureLog(tracker, other, mode="a")
    with pytest.raises(ValueError, match="k|columns"):  # another k has other columns
        lyapcuda.CurvatureLog(problem.tracker(k=2), path, mode="a")
    with pytest.raises(FileNotFoundError, match="no folder"):
        lyapcuda.CurvatureLog(tracker, tmp_path / "none" / "a.csv")
    for target, content in [
        (path, b"one line without an end"),
        (other, b"one line without an end"),
        (path, b"\xff\xfe binary\n"),
    ]:
        target.write_bytes(content)
        with pytest.raises(ValueError, match=target.name):
            lyapcuda.CurvatureLog(tracker, target, mode="a")
        assert target.read_bytes() == content
    for target, content in [(path, b""), (other, b'{"step": 1, "lo')]:
        target.write_bytes(content)
        with lyapcuda.CurvatureLog(tracker, target, mode="a"):
            pass
    assert len(read_csv(path)) == len(read_jsonl(other)) == 3
    new = tmp_path / "new.csv"
    with lyapcuda.CurvatureLog(tracker, new, mode="a"):  # nothing there to go on with
        pass
    assert len(read_csv(new)) == 3


def test_a_write_that_fails_leaves_the_file_whole_and_is_done_again(problem, tmp_path, monkeypatch):
    tracker, memory, path = problem.tracker(), Memory(), tmp_path / "a.csv"
    log = lyapcuda.CurvatureLog(tracker, memory, path, every=4)
    problem.take(tracker, 4)
    before = path.read_bytes()
    real = log._writers[1]._file._file

    class Full:
        def write(self, data):
            if len(data) > 100:
                return real.write(data[:100])
            raise OSError(28, "No space left on device")

        def fileno(self):
            return real.fileno()

    monkeypatch.setattr(log._writers[1]._file, "_file", Full())
    problem.take(tracker, 3, 4)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            problem.take(tracker, 1, 7)
        assert path.read_bytes() == before
    monkeypatch.setattr(log._writers[1]._file, "_file", real)
    log.close()
    assert [int(row["step"]) for row in read_csv(path)] == list(range(1, 10))
    assert [row["step"] for row in memory.rows] == list(range(1, 10))
    assert int(tracker.steps) == 9  # the measurement itself was taken


def test_lines_are_added_all_or_none(tmp_path):
    file = LineFile(tmp_path / "a", ["one"])
    file.add(["zwei", "drei ä"])
    file.sync()
    file.close()
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\nzwei\ndrei ä\n"


def test_measurements_that_are_lost_get_a_warning(problem):
    tracker, memory = problem.tracker(history=3), Memory()
    log = lyapcuda.CurvatureLog(tracker, memory, every=3)
    problem.take(tracker, 3)
    memory.broken = True
    problem.take(tracker, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            problem.take(tracker, 1)
    memory.broken = False
    with pytest.warns(UserWarning, match="1 measurements were overwritten"):
        log.flush()
    assert [row["step"] for row in memory.rows] == [1, 2, 3, 5, 6, 7]


def test_what_waits_is_written_when_the_run_fails(problem, tmp_path):
    tracker, path = problem.tracker(), tmp_path / "a.jsonl"
    with pytest.raises(ZeroDivisionError), lyapcuda.CurvatureLog(tracker, path):
        problem.take(tracker, 2)
        tracker.step(lambda: problem.closures[0]() * math.nan)
        tracker.step(lambda: 1 / 0)
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] is None for row in rows] == [False, False, True]  # NaN is no JSON
    assert [row["accepted"] for row in rows] == [True, True, False]


@pytest.mark.parametrize("own", [True, False])
def test_tensorboard_has_every_measurement(problem, own, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, writer = problem.tracker(every=3), SummaryWriter(str(tmp_path))
    target = writer if own else lyapcuda.TensorBoardWriter(tmp_path, prefix="curvature/")
    with lyapcuda.CurvatureLog(tracker, target, every=2):
        problem.take(tracker, 10)
    writer.add_scalar("still open", 1.0, 0)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    columns = tracker.history().columns()
    for name in ("loss", "h", "h_low", "h_high", "exponent", "beta"):
        found = events.Scalars(f"curvature/{name}")
        assert [event.step for event in found] == [1, 4, 7, 10]
        expected = torch.tensor(columns[name], dtype=torch.float32).tolist()
        assert [event.value for event in found] == pytest.approx(expected, nan_ok=True)
    assert "still open" in events.Tags()["scalars"]


def test_tensorboard_of_a_run_that_was_broken_off(problem, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = problem.tracker()
    log = lyapcuda.CurvatureLog(tracker, lyapcuda.TensorBoardWriter(tmp_path))
    problem.take(tracker, 4)
    saved = tracker.state_dict()
    problem.take(tracker, 3)  # other minibatches than those that follow the checkpoint below
    log.close()
    resumed = problem.tracker()
    resumed.load_state_dict(saved)
    with lyapcuda.CurvatureLog(resumed, lyapcuda.TensorBoardWriter(tmp_path)):
        problem.take(resumed, 2, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("curvature/h")}
    expected = resumed.history().h.float().tolist()
    assert found == pytest.approx(dict(enumerate(expected, 1)))


def test_tensorboard_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'lyapcuda\[tensorboard\]'"):
        lyapcuda.TensorBoardWriter(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_log_follows_a_tracker_that_loads_an_earlier_state(problem, suffix, tmp_path):
    """In one and the same run: the file is that of a run that never went astray."""
    path = tmp_path / f"run.{suffix}"
    read = read_csv if suffix == "csv" else read_jsonl
    rows = lambda: [int(row["step"]) for row in read(path)]  # noqa: E731
    tracker, memory = problem.tracker(), Memory()
    with lyapcuda.CurvatureLog(
        tracker, path, memory, every=3, values={"calls": lambda: tracker.calls}
    ) as log:
        problem.take(tracker, 5)
        saved = tracker.state_dict()
        problem.take(tracker, 5, 7)
        log.sync()
        assert rows() == list(range(1, 11))
        tracker.load_state_dict(saved)
        assert rows() == [1, 2, 3, 4, 5]
        problem.take(tracker, 3, 5)
    assert rows() == list(range(1, 9))
    assert [row["step"] for row in memory.rows] == [*range(1, 11), *range(6, 9)]
    text = path.read_text()
    other = problem.tracker()
    straight = tmp_path / f"straight.{suffix}"
    with lyapcuda.CurvatureLog(other, straight, values={"calls": lambda: other.calls}):
        problem.take(other, 8)
    assert straight.read_text() == text


def test_a_log_follows_a_tracker_that_loads_a_later_state(problem):
    other, tracker, memory = problem.tracker(), problem.tracker(), Memory()
    problem.take(other, 6)
    log = lyapcuda.CurvatureLog(tracker, memory, values={"here": lambda: 1.0})
    problem.take(tracker, 2)
    tracker.load_state_dict(other.state_dict())
    assert [row["step"] for row in memory.rows] == [1, 2]  # nothing that waited is lost
    problem.take(tracker, 1, 6)
    log.close()
    assert [row["step"] for row in memory.rows] == list(range(1, 8))
    here = [row["here"] for row in memory.rows]
    assert here == pytest.approx([1, 1, *[math.nan] * 4, 1], nan_ok=True)
    problem.take(tracker, 1)
    tracker.load_state_dict(other.state_dict())
    assert len(memory.rows) == 7  # closed


def test_a_state_that_is_refused_leaves_the_log(problem, tmp_path):
    tracker, path = problem.tracker(), tmp_path / "run.csv"
    with lyapcuda.CurvatureLog(tracker, path) as log:
        problem.take(tracker, 2)
        saved = tracker.state_dict()
        problem.take(tracker, 2, 2)
        for damage in ({"k": 7}, {"refinement": 3}, {"separations": [3]}):
            with pytest.raises((ValueError, TypeError, AttributeError)):
                tracker.load_state_dict({**saved, **damage})
        log.sync()
        assert [int(row["step"]) for row in read_csv(path)] == [1, 2, 3, 4]


def test_tensorboard_hides_what_is_past_a_state_that_is_loaded(problem, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = problem.tracker()
    start = tracker.state_dict()
    with lyapcuda.CurvatureLog(tracker, lyapcuda.TensorBoardWriter(tmp_path), every=1):
        problem.take(tracker, 4)
        tracker.load_state_dict(start)
        problem.take(tracker, 2, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("curvature/h")}
    expected = tracker.history().h.float().tolist()
    assert found == pytest.approx(dict(enumerate(expected, 1)))


def test_hooks_end_with_their_handles_and_stay_out_of_copies(problem):
    tracker, seen = problem.tracker(every=2), []
    handle = tracker.register_step_hook(lambda t: seen.append(t))
    problem.take(tracker, 4)
    model, twin = copy.deepcopy((problem.model, tracker))
    for _ in range(2):
        twin.step(lambda: model(torch.ones(2, 6)).square().mean())
    assert seen == [tracker, tracker]  # what was measured, and not the copy's
    handle.remove()
    problem.take(tracker, 2)
    assert len(seen) == 2 and twin.history().step.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ((), {}, ValueError, "targets: none"),
        (("a.txt",), {}, ValueError, "'a.txt' ends in none of"),
        ((3,), {}, TypeError, "targets: 3 is no path"),
        (("a.csv",), {"every": 0}, ValueError, "every=0"),
        (("a.csv",), {"every": 1001}, ValueError, "every=1001: the tracker keeps only 1000"),
        (("a.csv",), {"mode": "r"}, ValueError, "mode='r'"),
        (("a.csv",), {"values": {"h": lambda: 1}}, ValueError, "a column 'h' already"),
        (("a.csv",), {"values": {"lr": 0.1}}, TypeError, "lr=0.1: expected a function"),
    ],
)
def test_bad_arguments_are_named(problem, targets, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        lyapcuda.CurvatureLog(problem.tracker(), *targets, **options)
    with pytest.raises(ValueError, match="keeps only 0"):
        lyapcuda.CurvatureLog(problem.tracker(history=0), "b.csv")
    assert not list(tmp_path.iterdir())


def test_the_quasi_newton_optimizers_tracker(problem):
    optimizer = lyapcuda.LyapunovSGD(problem.model.parameters(), warmup_iterations=0, max_lr=0.2)
    memory = Memory()
    with lyapcuda.CurvatureLog(optimizer.tracker, memory, values={"last lr": lambda: optimizer.lr}):
        rates = []
        for closure in problem.closures:
            optimizer.step(closure)
            rates.append(float(optimizer.lr))
    assert [row["step"] for row in memory.rows] == [1, 2, 3, 4, 5, 6]
    # The measurement comes before the step that it sets the rate of.
    assert [row["last lr"] for row in memory.rows] == pytest.approx(
        [math.nan, *rates[:-1]], nan_ok=True
    )
