"""The paper's figure of a run: exponent, inverse curvature, learning rate and loss."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from lyapcuda.files import replace_file
from lyapcuda.plots.figure import BLUE, GREEN, ORANGE, PURPLE, RED, new_figure

LOSS_NAMES = {"ce": "cross-entropy", "mse": "mean squared error"}
SCHEDULE_TITLES = {"constant": "constant rate", "cyclic": "cyclic rate", "qn": "quasi-Newton"}
MODEL_TITLES = {
    "linear": "linear",
    "mlp": "MLP",
    "lenet1": "LeNet-1",
    "resnet0": "ResNet0",
    "resnet18": "ResNet-18",
}
_NEEDED = ("epoch", "exponent", "h_low", "h_high", "inverse_h", "lr", "loss")


def title_of(model: str, loss: str, schedule: str) -> str:
    """The title of a run's figure."""
    return f"{MODEL_TITLES[model]}, {LOSS_NAMES[loss]}, {SCHEDULE_TITLES[schedule]}"


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns that a plot needs, as float64 ``(steps,)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column or a value is missing or not a number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such CSV")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        rows = list(reader)
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in _NEEDED}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def plot_run(csv_path: str | Path, png_path: str | Path | None = None, title: str = "") -> Path:
    """Draw a run's CSV like the paper's Figures 1 and 2.

    Values that a logarithmic axis can't show (not positive, NaN, infinite) are left out.

    Args:
        csv_path: a ``run.csv``.
        png_path: the picture to make or replace; default: beside the CSV, ending in ``.png``.
        title: over the picture; see :func:`title_of`.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: there is no such CSV.
        ImportError: without matplotlib.
        ValueError: the CSV is malformed.
    """
    csv_path = Path(csv_path)
    png_path = csv_path.with_suffix(".png") if png_path is None else Path(png_path)
    columns = read_columns(csv_path)
    figure = new_figure()
    _draw(figure, columns, title)
    replace_file(png_path, lambda file: figure.savefig(file, format="png"))
    return png_path


def _positive(values: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_where(~np.isfinite(values) | (values <= 0), values)


def _draw(figure: Any, columns: dict[str, np.ndarray], title: str) -> None:
    # Margins for labels like "4 × 10⁻¹"; finding them is half of a layout engine's drawing time.
    left = figure.add_axes((0.125, 0.185, 0.75, 0.74))
    handles = draw_curves(left, columns)
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False)
    if title:
        left.set_title(title)


def draw_curves(
    left: Any,
    columns: dict[str, np.ndarray],
    *,
    unbiased: bool = False,
    width: float = 1.1,
    labels: bool = True,
) -> list[Any]:
    """Draw a run's columns on axes of a matplotlib figure, the loss on a second vertical axis.

    Args:
        left: the axes.
        columns: from :func:`read_columns`.
        unbiased: for a run with ``estimate="paper"``: instead of the interval, the inverse of its
            middle, the Rayleigh quotient; and α/2, below which 1/h₀ makes a step unstable.
        width: of a line, in points.
        labels: whether to name the vertical axes.

    Returns:
        The curves, for a legend.
    """
    right = left.twinx()
    # The curves of the left axis lie over the loss; its background must then be clear.
    left.set_zorder(2)
    left.patch.set_visible(False)
    epochs = columns["epoch"]
    # One row makes no line.
    style = {"linewidth": width, "marker": "o" if len(epochs) < 3 else None, "markersize": 3}

    def curve(axes: Any, values: np.ndarray, color: str, label: str, **changes: Any) -> Any:
        (line,) = axes.plot(
            epochs, _positive(values), color=color, label=label, **(style | changes)
        )
        return line

    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (_positive(1.0 / columns[name]) for name in ("h_high", "h_low"))
        middle = 2.0 / (columns["h_low"] + columns["h_high"])
    exponent = curve(left, columns["exponent"], BLUE, "λ")
    if unbiased:
        inverse = curve(left, columns["inverse_h"], ORANGE, "1/h₀ as printed")
        beside = [curve(left, middle, PURPLE, "1/h₀ unbiased")]
        edge = {"linewidth": 0.8 * width, "linestyle": (0, (3, 2))}
        beside.append(curve(left, columns["lr"] / 2.0, RED, "α/2", **edge))
    else:
        inverse = curve(left, columns["inverse_h"], ORANGE, "1/h₀")
        band = {"color": ORANGE, "alpha": 0.22, "linewidth": 0, "label": "1/h₀, interval"}
        beside = [left.fill_between(epochs, low, high, **band)]
    rate = curve(left, columns["lr"], RED, "α", linewidth=1.6 * width)
    loss = curve(right, columns["loss"], GREEN, "loss")

    if len(epochs):
        left.set_xscale("log")
        left.set_xlim(epochs[0], max(epochs[-1], epochs[0] * 1.1))
    for axes in (left, right):
        # matplotlib refuses a logarithmic axis with nothing on it.
        if any(np.ma.count(line.get_ydata(orig=True)) for line in axes.lines):
            axes.set_yscale("log")
    if labels:
        left.set_xlabel("epochs")
        left.set_ylabel("λ, 1/h₀, α")
        right.set_ylabel("loss", color=GREEN)
    right.tick_params(axis="y", which="both", colors=GREEN)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Translucent, for it also lies over the loss.
    left.grid(which="major", color="0.4", alpha=0.16, linewidth=0.7)
    left.set_axisbelow(True)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    return [exponent, inverse, *beside, rate, loss]
