"""Pictures: what their artists hold; where they go. Representations: short, and never an error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lyapcuda
from lyapcuda.__main__ import main
from lyapcuda.plots.run import draw_run, read_run
from lyapcuda.tables import aligned

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


P = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)


def loss():
    return (P**4).sum() + P.square().sum()


@pytest.fixture(scope="module")
def result():
    return lyapcuda.eigsh(loss, [P], k=2)


@pytest.fixture(scope="module")
def density():
    return lyapcuda.spectral_density(loss, [P], draws=2, steps=3)


def trained(steps=20, k=1):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p], lr=0.01)
    tracker = lyapcuda.CurvatureTracker([p], k, optimizer=optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        tracker.backward(lambda: (p**4).sum())
        optimizer.step()
    return tracker


def test_eigenvalues_are_drawn_in_their_intervals(result):
    ax = result.plot()
    (container,) = ax.containers
    points = container.lines[0]
    assert points.get_ydata() == pytest.approx(result.eigenvalues.tolist())
    low, high = (segment[:, 1] for segment in container.lines[2][0].get_segments())
    assert [low[0], low[1]] == pytest.approx(result.interval[0].tolist())
    assert [high[0], high[1]] == pytest.approx(result.interval[1].tolist())


def test_axes_of_the_users_are_drawn_on_and_pyplot_hears_of_nothing_else(result, density, tmp_path):
    figure, (one, two) = pyplot.subplots(1, 2)
    assert result.plot(ax=one) is one and density.plot(ax=two) is two
    assert pyplot.get_fignums() == [figure.number]
    assert two.lines[0].get_ydata() == pytest.approx(
        density.density.clamp_min(1e-6 * density.density.max()).tolist()
    )
    result.plot(tmp_path / "values.pdf")
    assert (tmp_path / "values.pdf").read_bytes().startswith(b"%PDF")
    assert pyplot.get_fignums() == [figure.number]


def test_without_axes_there_is_one_new_figure_for_a_notebook_to_show(density):
    ax = density.plot()
    assert pyplot.get_fignums() == [ax.figure.number]


@pytest.mark.parametrize("bad", [3, "density.png"])
def test_other_things_than_axes_are_refused(result, bad):
    with pytest.raises(TypeError, match="ax="):
        result.plot(ax=bad)
    with pytest.raises(ValueError, match="path, ax"):
        result.plot("values.png", ax=pyplot.figure().add_subplot())


def test_scales_are_drawn_a_line_a_vector():
    found = lyapcuda.finite_scale(loss, [P], vectors=torch.eye(2, 3))
    lines = found.plot().lines
    assert [line.get_ydata().tolist() for line in lines] == found.curvatures.T.tolist()


def test_a_run_is_drawn_with_what_would_be_stable():
    history = trained().history()
    axes = history.plot()
    assert [ax.get_ylabel() for ax in axes] == ["curvature", "edge: 1 is the limit", "loss"]
    h, stable = (line.get_ydata() for line in axes[0].lines)
    assert h == pytest.approx(history.h.tolist())
    assert stable == pytest.approx(200.0)  # 2/lr
    assert axes[1].lines[0].get_ydata() == pytest.approx(history.edge.tolist())
    assert axes[2].get_yscale() == "log"
    # The last of several curvatures, on axes of one's own.
    history, ax = trained(k=2).history(), pyplot.figure().add_subplot()
    assert history.plot(ax=ax) is ax
    assert ax.lines[1].get_ydata() == pytest.approx(history.h[:, 1].tolist())


def test_what_the_first_measurements_are_isnt_scaled_to():
    figure = pyplot.figure()
    h = [1e6, 1e5, *[3.0] * 30]
    (ax,) = draw_run(figure, {"step": list(range(32)), "h": h})
    assert ax.get_ylim()[1] < 4.0


def test_a_run_of_nothing_but_nan_is_drawn():
    run = {"step": [1, 2], "h": [math.nan] * 2, "loss": [math.nan] * 2, "edge": [math.nan] * 2}
    assert len(draw_run(pyplot.figure(), run)) == 3


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_plot_draws_a_log(tmp_path, capsys, suffix):
    log = tmp_path / f"run{suffix}"
    tracker = trained(0)
    with lyapcuda.CurvatureLog(tracker, log, values={"lr": lambda: 0.01}):
        p = tracker.parameters[0]
        for _ in range(6):
            tracker.step(lambda: (p**4).sum())
    run = read_run(log)
    assert run["h"] == pytest.approx(tracker.history().h.tolist()) and run["lr"] == [0.01] * 6
    assert main(["plot", str(log)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'}\n"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    two = tmp_path / "two.svg"
    other = tmp_path / f"other{suffix}"
    other.write_bytes(log.read_bytes())
    assert main(["plot", str(log), str(other), "--out", str(two)]) == 0
    assert "run" in two.read_text() and "svg" in two.read_text()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.txt", "", "expected a .csv or .jsonl"),
        ("run.csv", "a,b\n1,2\n", "no columns step and h"),
        ("run.csv", "step,h\n1,many\n", "not a log"),
        ("run.jsonl", "[1]\n", "not a log"),
        ("none.csv", None, "No such file"),
    ],
)
def test_what_isnt_a_log_is_said_in_a_line(tmp_path, capsys, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["plot", str(tmp_path / name)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and words in error and name in error
    assert not list(tmp_path.glob("*.png"))


def test_pictures_of_other_kinds_are_refused_before_anything_is_read(capsys):
    assert main(["plot", "nowhere.csv", "--out", "run.xyz"]) == 2
    assert "--out=run.xyz" in capsys.readouterr().err


def test_representations_are_short_and_tell_the_values(result, density):
    text = repr(result)
    assert len(text.splitlines()) == 4 and max(map(len, text.splitlines()[1:])) <= 80
    assert f"{float(result.eigenvalues[0]):.6g}" in text and "yes" in text
    assert "<table>" in result._repr_html_() and "&" not in result._repr_html_()
    assert repr(density).startswith("SpectralDensity(from ") and len(repr(density)) < 90
    assert density._repr_png_().startswith(b"\x89PNG")
    trace = lyapcuda.trace(loss, [P], samples=6)
    assert repr(trace).startswith(f"TraceResult({trace.trace:.6g} ± ")
    scale = lyapcuda.finite_scale(loss, [P], vectors=torch.eye(2, 3))
    assert len(repr(scale).splitlines()) == 5
    assert repr(lyapcuda.HessianOperator(loss, [P])) == (
        "HessianOperator(3 parameters, auto, torch.float64)"
    )


def test_a_tracker_says_what_it_follows_before_and_after_it_measured():
    assert repr(trained(0)) == (
        "CurvatureTracker(2 parameters, k=1, which='LA', of SGD): nothing measured yet"
    )
    tracker = trained(30)
    assert f"h {float(tracker.h):.4g} ± " in repr(tracker)
    assert f"edge {float(tracker.edge):.3g} at step 30" in repr(tracker)
    assert len(repr(trained(3, k=2))) < 140
    history = tracker.history()
    assert len(repr(history).splitlines()) == 5 and history._repr_png_().startswith(b"\x89PNG")
    empty = trained(0).history()
    assert repr(empty) == "CurvatureHistory of 0 measurements" and empty._repr_png_() is None


def test_optimizers_say_what_they_hold():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    cap = lyapcuda.RateCap(optimizer, lyapcuda.CurvatureTracker([p], optimizer=optimizer))
    assert repr(cap) == "RateCap(SGD, c=1): rates times 1"
    assert repr(lyapcuda.CDAT(optimizer)).startswith("CDAT(sigma=0.85, SGD (")


def test_a_table_stands_in_columns():
    rows = [("", "value"), ("0", "12.5"), ("10", "3")]
    assert aligned(rows, ">>") == ["    value", " 0   12.5", "10      3"]


def test_pictures_need_no_pyplot_state(density):
    before = dict(pyplot.rcParams)
    density._repr_png_()
    assert dict(pyplot.rcParams) == before and not pyplot.get_fignums()
    assert np.isfinite(density.density.numpy()).all()


def test_logs_that_differ_share_a_picture(tmp_path, capsys):
    one, other = tmp_path / "a" / "run.csv", tmp_path / "a" / "run.jsonl"
    one.parent.mkdir()
    one.write_text("step,h,edge,loss\n1,2,0.5,1\n2,3,0.7,0.5\n")
    other.write_text('{"step": 1, "h": 4}\n{"step": 2, "h": 5, "loss": 3}\n')
    assert read_run(other)["loss"][1:] == [3.0]
    for logs in ([one, other], [other, one]):
        assert main(["plot", *map(str, logs), "--out", str(tmp_path / "both.svg")]) == 0
    figure = pyplot.figure()
    axes = draw_run(figure, {"one": read_run(one), "other": read_run(other)})
    assert [len(ax.lines) for ax in axes] == [2, 2, 2]  # (the edge's limit is a line)
    empty = tmp_path / "empty.csv"
    empty.write_text("step,h\n")
    capsys.readouterr()
    assert main(["plot", str(empty)]) == 2 and "no measurements yet" in capsys.readouterr().err
