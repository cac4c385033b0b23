"""The picture of a run."""

import csv
import math

import numpy as np
import pytest

from examples.paper import plots
from examples.paper.runlog import COLUMNS

pytest.importorskip("matplotlib")


def write_csv(path, steps, **columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, steps + 1):
            row = {name: 1.0 + 0.1 * step for name in COLUMNS} | {"step": step, "epoch": step / 10}
            row |= {name: values[step - 1] for name, values in columns.items()}
            writer.writerow([row[name] for name in COLUMNS])
    return path


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_a_picture_is_drawn_of_any_number_of_steps(tmp_path, steps, recwarn):
    path = write_csv(tmp_path / "run.csv", steps)
    png = plots.plot_run(path, title=plots.title_of("mlp", "ce", "qn"))
    assert png == tmp_path / "run.png"
    picture = read_png(png)
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.01
    assert not recwarn.list
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_a_run_that_diverged_at_once_is_drawn(tmp_path):
    nan = [math.nan]
    path = write_csv(tmp_path / "run.csv", 1, loss=nan, inverse_h=nan, exponent=nan)
    assert read_png(plots.plot_run(path)).size


def colour_share(picture, colour):
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(picture[..., :3] - wanted).max(-1) < 0.02).mean()


def test_every_curve_is_drawn_in_its_colour_and_unplottable_values_are_left_out(tmp_path):
    n = 30
    bad = [math.nan, -1.0, 0.0, math.inf] * 8
    whole = plots.plot_run(
        write_csv(tmp_path / "whole.csv", n, lr=[0.1] * n, exponent=[0.5] * n, loss=[3.0] * n)
    )
    holed = plots.plot_run(
        write_csv(tmp_path / "holed.csv", n, inverse_h=bad[:n], exponent=[0.5] * n, h_low=bad[:n])
    )
    whole, holed = read_png(whole), read_png(holed)
    for colour in (plots.BLUE, plots.ORANGE, plots.RED, plots.GREEN):
        assert colour_share(whole, colour) > 2e-4
    # What is left of the orange is its key in the legend.
    assert colour_share(holed, plots.ORANGE) < 0.5 * colour_share(whole, plots.ORANGE)


@pytest.mark.parametrize("model", ["linear", "mlp", "lenet1", "resnet0", "resnet18"])
def test_titles_name_model_loss_and_schedule(model):
    parts = plots.title_of(model, "mse", "cyclic").split(", ")
    assert parts[1:] == ["mean squared error", "cyclic rate"]
    assert parts[0].lower().replace("-", "") == model


def test_a_malformed_csv_is_refused_by_name(tmp_path):
    path = tmp_path / "run.csv"
    with pytest.raises(FileNotFoundError, match="run.csv"):
        plots.plot_run(path)
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="run.csv: no column epoch"):
        plots.plot_run(path)
    write_csv(path, 2, lr=["fast", 1])
    with pytest.raises(ValueError, match="run.csv.*fast"):
        plots.plot_run(path)
    assert not (tmp_path / "run.png").exists()
