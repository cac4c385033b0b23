"""The paper's figures."""

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch

from examples.paper import train as training
from examples.paper.__main__ import main
from examples.paper.config import TrainConfig
from examples.paper.data import Dataset, Split
from examples.paper.figures import run, summary
from examples.paper.figures.table import FIGURES, Figure, Panel, Spectrum, scale_of
from run_support import rows_of, snapshot

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SMALL = ("mlp", "lenet1", "resnet0")
BOTH = ("ce", "mse")


def cifar_like(classes):
    split = Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % len(classes))
    one = torch.ones(3, 1, 1)
    return Dataset("cifar10", split, split, classes, 255.0, one, one)


def setups(number, schedule, faithful=True):
    return {
        (p.model, p.loss, p.lr)
        for p in FIGURES[number].panels
        if isinstance(p, Panel) and p.schedule == schedule and p.faithful == faithful and p.trains
    }


def test_the_table_has_the_paper_s_ten_figures():
    assert list(FIGURES) == list(range(1, 11))
    grid = {(model, loss) for model in SMALL for loss in BOTH}
    first = {("mlp", "ce"), ("resnet0", "ce"), ("mlp", "mse")}
    assert setups(1, "constant") == {(*run, lr) for run in first for lr in (0.1, 0.3)}
    assert setups(1, "cyclic") == {(*run, None) for run in first}
    assert setups(2, "qn") == {(m, o, None) for m in ("mlp", "lenet1", "resnet18") for o in BOTH}
    assert {(p.k, p.which) for p in FIGURES[3].panels} >= {(14, "LA")}
    assert setups(4, "constant") == {(*run, 0.05) for run in grid}
    assert setups(5, "constant") == {(*run, 0.1) for run in grid}
    assert setups(6, "constant") == {(*run, 0.3) for run in grid - {("resnet0", "mse")}}
    assert setups(7, "cyclic") == {(*run, None) for run in grid}
    assert setups(8, "qn") == {(model, "ce", None) for model in (*SMALL, "resnet18")}
    assert setups(9, "qn") == {(model, "mse", None) for model in ("linear", *SMALL)}
    assert setups(10, "qn") >= {("resnet18", "ce", None)}
    assert setups(10, "cyclic") == {("resnet18", "ce", None)}
    assert setups(10, "constant") == {("resnet18", "ce", 0.05)}
    # What it says doesn't train is run as well.
    for number in (4, 5, 6, 7):
        untrainable = {(p.model, p.loss) for p in FIGURES[number].panels if not p.trains}
        assert ("linear", "mse") in untrainable
        assert (("resnet0", "mse") in untrainable) == (number == 6)
    # Each quasi-Newton run by the paper's estimate and by ours.
    for number in (2, 8, 9):
        assert setups(number, "qn") == setups(number, "qn", faithful=False)


@pytest.mark.parametrize("number", FIGURES)
def test_at_full_scale_every_run_has_the_paper_s_settings(number):
    for panel in FIGURES[number].panels:
        ten = panel.model == "resnet18"
        config = panel.config(scale_of(panel.model, "some/folder", quick=False), "some/folder")
        classes = config.default_classes() or tuple(range(10))
        assert classes == (tuple(range(10)) if ten else (0, 1))
        config = config.resolved(cifar_like(classes))
        assert (config.batch_size, config.weight_decay, config.augment) == (512, 5e-4, True)
        assert config.max_steps is None and config.epochs > (100 if ten else 10)
        assert config.every == 1 and config.gain == 1.0
        if isinstance(panel, Spectrum) or panel.faithful:
            assert (config.estimate, config.perturbation) == ("paper", 5e-2)
        else:
            assert (config.estimate, config.perturbation) == ("growth", None)
        if isinstance(panel, Panel) and panel.schedule == "constant":
            assert config.lr == panel.lr


def test_a_name_stands_for_one_run():
    by_name = {}
    for figure in FIGURES.values():
        for panel in figure.panels:
            assert by_name.setdefault(panel.name, panel) == panel
    assert "mlp-ce-constant0.1" in by_name and "mlp-ce-qn-ours" in by_name


def test_a_figure_is_run_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["figures", "4", "--quick", "--max-steps", "4", "--batch-size", "32", "--no-progress"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    panels = FIGURES[4].panels
    assert f"{len(panels)}/{len(panels)}" in printed and str(out / "fig4.png") in printed
    assert (out / "fig4.png").stat().st_size < 150_000
    report = json.loads((out / "fig4.json").read_text())
    assert report["figure"] == 4 and report["data"] == "digits"
    assert [p["name"] for p in report["panels"]] == [p.name for p in panels]
    for found in report["panels"]:
        assert found["steps"] == 4 == len(rows_of(out / "panels" / found["name"]))
        assert found["config"]["max_steps"] == 4 and "data" not in found["config"]
        assert found["exact"] > 0 and math.isfinite(found["alpha_h"])
        assert {check["claim"] for check in found["checks"]}
    assert str(tmp_path) not in (out / "fig4.json").read_text()


def test_eigenvalues_over_the_first_epoch(tmp_path, monkeypatch):
    small = Figure(3, "", "", (Spectrum("linear", "mse", k=3), Spectrum("mlp", "ce", "SA", k=3)))
    monkeypatch.setitem(FIGURES, 3, small)
    job = run.Job(tmp_path / "out", quick=True, batch_size=256, device="cpu")
    largest, smallest = run.run_figures([3], job)[0]["panels"]
    for panel in (largest, smallest):
        assert panel["steps"] == 6  # of 1437 rows
        for name in ("unbiased", "printed", "unbiased_spread"):
            assert len(panel[name]) == 3
    assert len(largest["exact"]) == 3 and smallest["exact"] is None
    assert largest["unbiased"] == sorted(largest["unbiased"], reverse=True)
    assert smallest["unbiased"] == sorted(smallest["unbiased"])
    assert smallest["exponents"][0] == pytest.approx(-0.1 * smallest["unbiased"][0], rel=1e-3)


@pytest.fixture
def one_panel(monkeypatch):
    """Figure 1 as a single cheap run."""
    panel = Panel("linear", "ce", lr=0.1)
    monkeypatch.setitem(FIGURES, 1, Figure(1, "logistic regression", "none", (panel,)))
    return panel


def test_a_panel_that_is_there_is_not_run_again(tmp_path, monkeypatch, one_panel):
    job = run.Job(tmp_path / "out", max_steps=5)
    first = run.run_figures([1], job)
    before = snapshot(tmp_path / "out" / "panels" / one_panel.name)

    def unexpected(*arguments, **options):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", unexpected)
        (tmp_path / "out" / "fig1.png").unlink()
        assert run.run_figures([1], job) == first
        assert (tmp_path / "out" / "fig1.png").exists()  # the picture is drawn anew
        with pytest.raises(AssertionError):
            run.run_figures([1], dataclasses.replace(job, overwrite=True))
    assert run.run_figures([1], dataclasses.replace(job, overwrite=True)) == first
    after = snapshot(tmp_path / "out" / "panels" / one_panel.name)
    assert after["run.csv"] == before["run.csv"]


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(
    tmp_path, monkeypatch, capsys, one_panel
):
    command = ["figures", "1", "--max-steps", "9", "--no-progress", "--out"]
    one_step = training._Run._one_step

    def interrupted(self):
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)
        return one_step(self)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_one_step", interrupted)
        assert main([*command, str(out)]) == 130
    assert "goes on from there" in capsys.readouterr().err
    folder = out / "panels" / one_panel.name
    assert len(rows_of(folder)) == 5 and not (folder / "panel.json").exists()
    assert not (out / "fig1.png").exists()

    steps = []
    monkeypatch.setattr(
        training._Run, "_one_step", lambda self: steps.append(self.step) or one_step(self)
    )
    assert main([*command, str(out)]) == 0
    assert steps == [6, 7, 8, 9]
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole = tmp_path / "whole" / "panels" / one_panel.name / "run.csv"
    assert (folder / "run.csv").read_bytes() == whole.read_bytes()


def test_what_is_there_can_be_drawn_without_running_the_rest(tmp_path, monkeypatch, one_panel):
    job = run.Job(tmp_path / "out", max_steps=3)
    with pytest.raises(ValueError, match="out=.*: no panel of figure 1 was run"):
        run.run_figures([1], dataclasses.replace(job, draw_only=True))
    assert not job.out.exists()
    run.run_figures([1], job)
    other, half = Panel("mlp", "ce", lr=0.1), Panel("linear", "ce", lr=0.2)
    training.train(run.Job(job.out, max_steps=2).config(half), job.out / "panels" / half.name)
    monkeypatch.setitem(FIGURES, 1, Figure(1, "", "", (one_panel, other, half)))
    (report,) = run.run_figures([1], dataclasses.replace(job, draw_only=True))
    there, missing, unfinished = report["panels"]
    assert there["run"] and there["steps"] == 3 and there["finished"]
    assert unfinished["steps"] == 2 and not unfinished["finished"] and not unfinished["checks"]
    assert missing == {"name": other.name, "title": other.title, "run": False, "checks": []}
    assert not (job.out / "panels" / other.name).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["FIG", "1 to 10"]),
        (["0"], ["FIG", "'0'"]),
        (["11"], ["FIG", "'11'"]),
        (["1", "one"], ["FIG", "'one'"]),
        (["1", "--out", "file"], ["out", "file"]),
        (["1", "--data", "nowhere"], ["nowhere", "no such folder"]),
        (["1", "--batch-size", "0"], ["batch_size", "0"]),
        (["1", "--epochs", "-3"], ["epochs", "-3"]),
        (["1", "--device", "abacus"], ["device", "abacus"]),
        (["1", "--threads", "0"], ["threads", "0"]),
        (["1", "--seed", "-1"], ["seed", "-1"]),
    ],
)
def test_user_errors_are_one_line_and_change_nothing(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["figures", "--no-progress", "--quick", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("examples.paper: error: ")
    assert all(word in error for word in words), error
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_folder_with_other_runs_is_refused_and_kept(tmp_path, one_panel):
    job = run.Job(tmp_path / "out", max_steps=3)
    run.run_figures([1], job)
    folder = tmp_path / "out" / "panels" / one_panel.name
    before = snapshot(folder)
    with pytest.raises(ValueError, match="panel.json: max_steps was 3 in this run, got 4"):
        run.run_figures([1], dataclasses.replace(job, max_steps=4))
    with pytest.raises(ValueError, match="panel.json: seed was 0 in this run, got 1"):
        run.run_figures([1], dataclasses.replace(job, seed=1))
    assert snapshot(folder) == before
    done = json.loads((folder / "panel.json").read_text())
    (folder / "panel.json").write_text(json.dumps(done | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match="other rows"):
        run.run_figures([1], job)
    (folder / "panel.json").write_text("{")
    with pytest.raises(ValueError, match=r"panel.json: damaged, --overwrite"):
        run.run_figures([1], job)


def test_the_list_says_what_each_figure_shows(capsys):
    assert main(["figures", "--list"]) == 0
    printed = capsys.readouterr().out
    for number, figure in FIGURES.items():
        assert f"{number}: {figure.shows}" in printed and figure.claim in printed
        assert all(panel.name in printed for panel in figure.panels)
    assert main(["figures", "--list", "3"]) == 0
    assert capsys.readouterr().out.count("claim:") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("cycle_epochs", 0.0), ("cycle_ratio", 0.5), ("cycle_ratio", math.nan), ("warmup", -1)],
)
def test_bad_cycles_and_warm_ups_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        TrainConfig(**{name: value})


def test_cycles_have_the_length_and_the_range_asked_for(tmp_path):
    config = TrainConfig("linear", schedule="cyclic", lr=0.3, cycle_epochs=1, cycle_ratio=100)
    training.train(dataclasses.replace(config, max_steps=23), tmp_path)
    rates = [row["lr"] for row in rows_of(tmp_path)]
    peak = 6  # half of 11 steps an epoch, rounded
    assert rates[0] == pytest.approx(0.003) and rates[peak] == pytest.approx(0.3)
    assert rates[2 * peak] == pytest.approx(0.003) and rates[: peak + 1] == sorted(rates[:7])


# --- numbers -------------------------------------------------------------------------------------


def columns_of(alpha, h, loss=None, ratio=math.e - 1):
    """Columns of a run with α and Algorithm 1's h0, the unbiased one being `ratio` times that."""
    steps = len(h)
    h = np.asarray(h, float)
    return {
        "epoch": np.arange(1, steps + 1) / 10,
        "exponent": np.ones(steps),
        "h_low": ratio * h - 1,
        "h_high": ratio * h + 1,
        "inverse_h": 1 / h,
        "lr": np.broadcast_to(np.asarray(alpha, float), steps),
        "loss": np.linspace(1, 0.1, steps) if loss is None else np.asarray(loss, float),
    }


def left(**changes):
    return {"diverged": False, "accuracy": 0.9, "exact": None} | changes


def held(numbers):
    return [check["holds"] for check in numbers["checks"]]


def test_a_constant_rate_is_followed_or_not():
    panel = Panel("mlp", "ce", lr=0.1)
    numbers = summary.of_run(panel, columns_of(0.1, [1.0] * 20 + [10.0] * 20), left(exact=17.18))
    assert numbers["alpha_h_printed"] == pytest.approx(1) and held(numbers) == [True, True]
    assert numbers["factor"] == pytest.approx(math.e - 1, rel=1e-3)
    assert numbers["unbiased_over_exact"] == pytest.approx(1, rel=1e-3)
    assert numbers["printed_over_exact"] == pytest.approx(1 / (math.e - 1), rel=1e-3)
    for off in (6.0, 14.0, -10.0):
        numbers = summary.of_run(panel, columns_of(0.1, [off] * 40), left())
        assert held(numbers) == [True, False]
    rising = columns_of(0.1, [10.0] * 40, loss=np.linspace(1, 2, 40))
    assert held(summary.of_run(panel, rising, left())) == [False, True]
    flat = dataclasses.replace(panel, trains=False)
    assert held(summary.of_run(flat, rising, left())) == [True]
    diverged = columns_of(0.1, [10.0] * 40, loss=[*np.linspace(1, 0.5, 39), math.nan])
    assert held(summary.of_run(flat, diverged, left(diverged=True))) == [True]
    assert held(summary.of_run(flat, columns_of(0.1, [10.0] * 40), left())) == [False]


def test_a_cyclic_rate_is_followed_or_not():
    alpha = 10 ** np.cos(np.arange(400) / 20)
    panel = Panel("mlp", "ce", "cyclic")
    numbers = summary.of_run(panel, columns_of(alpha, 1 / alpha), left())
    assert numbers["correlation"] == pytest.approx(1) and numbers["slope"] == pytest.approx(1)
    assert held(numbers) == [True, True]
    # Curvature that can't rise above 1: small rates aren't reached.
    numbers = summary.of_run(panel, columns_of(alpha, np.minimum(1 / alpha, 1)), left())
    assert numbers["alpha_h_at_high_alpha"] == pytest.approx(1)
    assert numbers["alpha_h_at_low_alpha"] < 0.5 and 0 < numbers["slope"] < 1
    numbers = summary.of_run(panel, columns_of(alpha, np.full(400, 3.0)), left())
    assert math.isnan(numbers["correlation"]) and held(numbers) == [True, False]


def test_a_quasi_newton_run_is_stable_or_not():
    panel = Panel("mlp", "ce", "qn")
    h = np.linspace(5, 20, 100)
    numbers = summary.of_run(panel, columns_of(1 / h, h), left())
    assert held(numbers) == [True, True, True] and numbers["lr_first"] == pytest.approx(0.2)
    bumpy = 1 - 0.005 * np.arange(100) + 0.3 * (np.arange(100) // 10 == 5)
    numbers = summary.of_run(panel, columns_of(1 / h[::-1], h[::-1], bumpy), left())
    assert held(numbers) == [True, False, False] and numbers["loss_rises"] == 1


# --- the factor, by running ----------------------------------------------------------------------


def test_algorithm_1_as_printed_is_short_by_e_minus_1(tmp_path, monkeypatch):
    # Full batches of a least-squares problem: its Hessian is the same everywhere.
    panels = (Panel("linear", "mse", lr=0.02), Panel("linear", "mse", "qn", faithful=False))
    monkeypatch.setitem(FIGURES, 1, Figure(1, "", "", panels))
    job = run.Job(tmp_path / "out", quick=True, batch_size=1437, epochs=60, device="cpu")
    printed, ours = run.run_figures([1], job)[0]["panels"]
    assert printed["factor"] == pytest.approx(math.e - 1, rel=2e-3)
    assert printed["printed_over_exact"] == pytest.approx(1 / (math.e - 1), rel=2e-3)
    assert printed["unbiased_over_exact"] == pytest.approx(1, rel=2e-3)
    assert ours["unbiased_over_exact"] == pytest.approx(1, rel=2e-3)
    assert ours["lr_last"] * ours["exact"] == pytest.approx(1, rel=5e-3)


def test_measuring_by_either_estimate_leaves_the_run_alone_and_they_agree(tmp_path, monkeypatch):
    panels = tuple(Panel("mlp", "ce", lr=0.1, faithful=faithful) for faithful in (True, False))
    monkeypatch.setitem(FIGURES, 1, Figure(1, "", "", panels))
    job = run.Job(tmp_path / "out", quick=True, max_steps=60, device="cpu")
    run.run_figures([1], job)
    printed, ours = (rows_of(tmp_path / "out" / "panels" / panel.name) for panel in panels)
    assert [row["loss"] for row in printed] == [row["loss"] for row in ours]
    ratios = [
        (a["h_low"] + a["h_high"]) / 2 / b["h"]
        for a, b in zip(printed[30:], ours[30:], strict=True)
    ]
    assert np.median(ratios) == pytest.approx(1, abs=0.1)
