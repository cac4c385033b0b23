"""Training runs and their resumption."""

import dataclasses
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.paper import checkpoint, plots
from examples.paper import train as train_module
from examples.paper.cifar import PIXELS, TEST_NAME, TRAIN_NAMES
from examples.paper.config import TrainConfig
from examples.paper.runlog import COLUMNS, READ_EVERY
from examples.paper.train import train
from run_support import rows_of, snapshot, state_of

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
# Two epochs of eleven steps; deterministic whatever the machine's number of threads.
SHORT = {"epochs": 2, "device": "cpu"}


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of the numbers alone: half the time of a short run is its picture."""
    monkeypatch.setattr(plots, "plot_run", lambda csv_path, png_path, title: png_path)


def assert_same_state(one, two, path="checkpoint"):
    assert type(one) is type(two), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same_state(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same_state(*pair, f"{path}[{index}]")
    else:
        assert one == two or one != one and two != two, path


def write_cifar(folder: Path, seed: int = 0, rows: int = 16) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in (*TRAIN_NAMES, TEST_NAME):
        content = rng.integers(0, 256, (rows, 1 + PIXELS), dtype=np.uint8)
        content[:, 0] = np.arange(rows) % 2
        (folder / f"{name}.bin").write_bytes(content.tobytes())
    return folder


@pytest.mark.parametrize("schedule", ["constant", "cyclic", "qn"])
def test_a_run_learns_and_logs_every_step(tmp_path, schedule):
    result = train(TrainConfig(schedule=schedule, loss="mse", epochs=4, lr=0.5), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == list(COLUMNS)
    assert [row["step"] for row in rows] == list(range(1, 45))
    assert rows[10]["epoch"] == 1 and rows[-1]["epoch"] == 4
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert result.accuracy is not None and 0.2 < result.accuracy <= 1
    assert (result.loss, result.h, result.step) == (rows[-1]["loss"], rows[-1]["h"], 44)
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["h_low"] <= row["h"] <= row["h_high"]
        assert math.isclose(row["inverse_h"], 1 / row["h"])
        assert row["beta"] > 0 and row["lr"] > 0
    for path in (result.csv, result.png, result.checkpoint):
        assert path.stat().st_size > 100
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoint.pt",
        "run.csv",
        "run.png",
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_learning_rates_follow_their_schedules(tmp_path):
    train(TrainConfig(schedule="constant", lr=0.03, **SHORT), tmp_path / "constant")
    assert {row["lr"] for row in rows_of(tmp_path / "constant")} == {0.03}
    train(TrainConfig(schedule="cyclic", lr=0.2, epochs=5, device="cpu"), tmp_path / "cyclic")
    rates = [row["lr"] for row in rows_of(tmp_path / "cyclic")]
    assert rates[0] == pytest.approx(0.02) and rates[22] == pytest.approx(0.2)
    assert rates[44] == pytest.approx(0.02) and max(rates) == rates[22]
    for gain in (0.25, 1.0):
        train(
            TrainConfig("linear", schedule="qn", gain=gain, max_steps=1), tmp_path / f"gain{gain}"
        )
    first = [rows_of(tmp_path / f"gain{gain}")[0]["lr"] for gain in (0.25, 1.0)]
    assert first[0] == pytest.approx(0.25 * first[1])


@pytest.mark.usefixtures("undrawn")
def test_weight_decay_is_part_of_the_curvature(tmp_path):
    # A step so small that the parameters stay, hence the same separations.
    base = TrainConfig(model="linear", loss="mse", lr=1e-9, max_steps=15, perturbation=0.05)
    train(dataclasses.replace(base, weight_decay=0.0), tmp_path / "without")
    train(dataclasses.replace(base, weight_decay=0.5), tmp_path / "with")
    without, with_decay = (rows_of(tmp_path / name)[-1]["h"] for name in ("without", "with"))
    assert with_decay - without == pytest.approx(0.5, rel=0.1)


@pytest.mark.usefixtures("undrawn")
def test_measuring_every_third_step_keeps_values_in_between(tmp_path):
    train(TrainConfig(every=3, max_steps=9), tmp_path / "out")
    h = [row["h"] for row in rows_of(tmp_path / "out")]
    measured = [value for value in h if math.isfinite(value)]
    assert len(set(measured)) == 3
    losses = [row["loss"] for row in rows_of(tmp_path / "out")]
    assert len(set(losses)) == 9


@pytest.mark.parametrize(
    ("schedule", "model", "every"),
    [
        ("constant", "mlp", 1),
        ("constant", "lenet1", 3),
        ("constant", "resnet0", 1),
        ("cyclic", "mlp", 1),
        ("cyclic", "resnet0", 2),
        ("qn", "linear", 1),
        ("qn", "resnet0", 1),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, schedule, model, every):
    # 288 rows, nine steps an epoch.
    small = {"classes": (0, 1), "batch_size": 32, "epochs": 3, "device": "cpu"}
    whole = TrainConfig(schedule=schedule, model=model, every=every, **small)
    train(whole, tmp_path / "whole")
    # In the middle of an epoch, and not where rows are read back together.
    train(dataclasses.replace(whole, max_steps=READ_EVERY - 6), tmp_path / "part")
    assert len(rows_of(tmp_path / "part")) == READ_EVERY - 6
    torch.manual_seed(99)  # the caller's generator must not matter
    train(whole, tmp_path / "part", resume=tmp_path / "part" / "checkpoint.pt")
    assert (tmp_path / "part" / "run.csv").read_bytes() == (
        tmp_path / "whole" / "run.csv"
    ).read_bytes()
    assert_same_state(state_of(tmp_path / "whole"), state_of(tmp_path / "part"))


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_augmented_cifar_run_is_bitwise_the_same_from_a_moved_folder(tmp_path):
    folder = write_cifar(tmp_path / "cifar")
    whole = TrainConfig(data=str(folder), model="lenet1", batch_size=16, epochs=2)
    train(whole, tmp_path / "whole")
    train(dataclasses.replace(whole, max_steps=7), tmp_path / "part")
    moved = dataclasses.replace(whole, data=str(folder.rename(tmp_path / "moved")))
    train(moved, tmp_path / "rest", resume=tmp_path / "part" / "checkpoint.pt")
    assert (tmp_path / "rest" / "run.csv").read_bytes() == (
        tmp_path / "whole" / "run.csv"
    ).read_bytes()
    assert state_of(tmp_path / "whole")["config"]["augment"] is True
    assert_same_state(state_of(tmp_path / "whole")["model"], state_of(tmp_path / "rest")["model"])
    assert len(rows_of(tmp_path / "part")) == 7  # left alone: --out was another folder

    other = dataclasses.replace(whole, data=str(write_cifar(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="data was .*cifar.* got .*other"):
        train(other, tmp_path / "rest", resume=tmp_path / "rest" / "checkpoint.pt")


@pytest.mark.usefixtures("undrawn")
def test_a_run_leaves_the_callers_generator_alone_and_depends_on_its_seed(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(TrainConfig(seed=seed, max_steps=3), tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
    a, b, c = ((tmp_path / name / "run.csv").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.usefixtures("undrawn")
def test_rows_behind_the_checkpoint_are_cut_off(tmp_path):
    config = TrainConfig(max_steps=5)
    train(config, tmp_path)
    kept = (tmp_path / "run.csv").read_bytes()
    with (tmp_path / "run.csv").open("ab") as file:
        file.write(b"6,0.5,1,1,1,1,1,1,1,1\n7,0.6,1,")  # a crash between two checkpoints
    train(dataclasses.replace(config, max_steps=8), tmp_path, resume=tmp_path / "checkpoint.pt")
    assert (tmp_path / "run.csv").read_bytes().startswith(kept)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 9))
    assert rows_of(tmp_path)[5]["loss"] != 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "linear"}, "model was mlp in this run, got linear"),
        ({"loss": "mse"}, "loss was ce in this run, got mse"),
        ({"schedule": "qn"}, "schedule was constant in this run, got qn"),
        ({"lr": 0.2}, "lr was 0.1 in this run, got 0.2"),
        ({"seed": 3}, "seed was 0 in this run, got 3"),
        ({"batch_size": 64}, "batch_size was 128 in this run, got 64"),
        ({"classes": (0, 1)}, r"classes was \(0, 1, 2.* got \(0, 1\)"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_another_configuration_is_refused_before_anything_changes(tmp_path, change, words):
    config = TrainConfig(max_steps=2)
    train(config, tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        other = dataclasses.replace(config, **change)
        train(other, tmp_path, resume=tmp_path / "checkpoint.pt")
    assert str(tmp_path / "checkpoint.pt") in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("undrawn")
def test_damaged_checkpoints_and_csvs_are_refused_before_anything_changes(tmp_path):
    config = TrainConfig(model="linear", max_steps=3)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    good = path.read_bytes()
    content = torch.load(path, weights_only=True)

    def refused(words: str, kind: type[Exception] = ValueError) -> None:
        before = snapshot(tmp_path / "run")
        with pytest.raises(kind, match=words) as caught:
            train(config, tmp_path / "run", resume=path)
        assert str(tmp_path / "run") in str(caught.value)
        assert snapshot(tmp_path / "run") == before

    for size in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused("not a readable checkpoint")
    torch.save({"model": {}}, path)
    refused("not a lyapcuda checkpoint")
    torch.save(Path("/"), path)  # a pickle that weights_only refuses
    refused("not a readable checkpoint")
    torch.save(content | {"version": 99}, path)
    refused("version 99")
    torch.save({k: v for k, v in content.items() if k != "loader"}, path)
    refused("loader")
    torch.save(content | {"config": {"model": "mlp"}}, path)
    refused("damaged")
    torch.save(content | {"model": {"1.weight": torch.zeros(3, 3)}}, path)
    refused("damaged")
    torch.save(content | {"schedule": {}}, path)
    refused("damaged")
    torch.save(content | {"loader": content["loader"] | {"batch": 1000}}, path)
    refused("damaged")

    path.write_bytes(good)
    log = tmp_path / "run" / "run.csv"
    lines = log.read_text().splitlines(keepends=True)
    for text, words in (
        ("".join(lines[:-1]), "ends at step 2, the checkpoint is at step 3"),
        ("".join([lines[0], *lines[2:]]), "row 1 is malformed"),
        ("a,b\n1,2\n", "columns"),
    ):
        log.write_text(text)
        refused(words)
    log.unlink()
    refused("run.csv.*missing", FileNotFoundError)
    path.unlink()
    refused("no such checkpoint", FileNotFoundError)


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_file(path, fail)
    assert snapshot(tmp_path) == {"file": b"old"}
    checkpoint.replace_file(path, lambda file: file.write(b"new"))
    assert snapshot(tmp_path) == {"file": b"new"}


@pytest.mark.usefixtures("undrawn")
def test_another_run_is_not_overwritten_unasked(tmp_path):
    train(TrainConfig(max_steps=2), tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path))):
        train(TrainConfig(max_steps=1), tmp_path)
    assert snapshot(tmp_path) == before
    train(TrainConfig(max_steps=1), tmp_path, overwrite=True)
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.usefixtures("undrawn")
def test_checkpoints_are_written_during_the_run(tmp_path, monkeypatch):
    steps = []
    save = checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda path, entries: (steps.append(entries["step"]), save(path, entries)),
    )
    train(TrainConfig(epochs=5), tmp_path, checkpoint_every=2)
    assert steps == [22, 44, 55]


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    config = TrainConfig(model="linear", loss="mse", lr=1e6, weight_decay=0.0, epochs=40)
    result = train(config, tmp_path / "a", checkpoint_every=100)
    assert result.diverged and result.accuracy is None
    rows = rows_of(tmp_path / "a")
    assert rows[-1]["step"] == result.step < 440 and not math.isfinite(rows[-1]["loss"])
    assert all(math.isfinite(row["loss"]) for row in rows[:-1])
    assert not result.checkpoint.exists() and result.png.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "vgg"}, "model.*vgg"),
        ({"loss": "hinge"}, "loss.*hinge"),
        ({"schedule": "cosine"}, "schedule.*cosine"),
        ({"estimate": "guess"}, "estimate.*guess"),
        ({"lr": 0.0}, "lr.*0.0"),
        ({"lr": math.nan}, "lr.*nan"),
        ({"gain": -1.0}, "gain.*-1.0"),
        ({"perturbation": 0.0}, "perturbation.*0.0"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
        ({"epochs": 0}, "epochs.*0"),
        ({"max_steps": 0}, "max_steps.*0"),
        ({"batch_size": -2}, "batch_size.*-2"),
        ({"every": 0}, "every.*0"),
        ({"every": 2, "schedule": "qn"}, "every.*qn.*2"),
        ({"seed": -1}, "seed.*-1"),
        ({"augment": True}, "augment"),
    ],
)
def test_bad_configurations_name_argument_and_value(values, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**values)


def test_a_second_ctrl_c_breaks_off(tmp_path, monkeypatch):
    class Stubborn(train_module._Run):
        def _one_step(self):
            values = super()._one_step()
            signal.raise_signal(signal.SIGINT)
            if self.step == 2:
                signal.raise_signal(signal.SIGINT)
            return values

    monkeypatch.setattr(train_module, "_Run", Stubborn)
    result = train(TrainConfig(), tmp_path / "one")
    assert result.interrupted and result.step == 1 and result.checkpoint.exists()
    with pytest.raises(KeyboardInterrupt):
        config = TrainConfig()
        train(config, tmp_path / "one", resume=tmp_path / "one" / "checkpoint.pt")
    assert state_of(tmp_path / "one")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_several_curvatures(tmp_path):
    train(TrainConfig("linear", schedule="qn", k=3, max_steps=6), tmp_path / "whole")
    train(TrainConfig("linear", schedule="qn", k=3, max_steps=3), tmp_path / "half")
    train(
        TrainConfig("linear", schedule="qn", k=3, max_steps=6),
        tmp_path / "rest",
        resume=tmp_path / "half" / "checkpoint.pt",
    )
    whole, rest = rows_of(tmp_path / "whole"), rows_of(tmp_path / "rest")
    assert whole == rest and len(whole) == 6
    one = train(TrainConfig("linear", schedule="qn", max_steps=6), tmp_path / "one")
    assert whole[-1]["lr"] > 0 and whole[-1]["lr"] != one.lr  # off the leading eigenvectors
    for bad, message in (
        ({"schedule": "constant"}, "k must be 1"),
        ({"estimate": "growth"}, "k=3"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig("linear", **{"schedule": "qn", "k": 3, **bad})
    for estimate in ("schwarz", "secant"):
        assert TrainConfig("linear", schedule="qn", k=3, estimate=estimate).estimate == estimate
    assert TrainConfig("linear", estimate="auto").estimate == "auto"
