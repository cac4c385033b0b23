"""A training run: the curvature beside what is stable, the edge, the loss and the rate."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lyapcuda.files import replace_file
from lyapcuda.plots.figure import BLUE, GREEN, ORANGE, PURPLE, RED, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SIZE", "draw_curvature", "draw_run", "read_run", "save_run"]

#: Columns by name: a number a measurement.
Run = Mapping[str, Sequence[float]]

#: Of a picture of a run, in inches.
SIZE = (9.0, 4.6)
EDGE = "edge of stability"
#: Where the panels stand, by how many there are.
_GRIDS = {1: "a", 2: "a;b", 3: "ab;ac", 4: "ab;cd"}
#: Names under which a log may hold the learning rate.
RATES = ("lr", "learning_rate", "rate")
#: The first measurements, of a separation that has found no eigenvector yet: not to scale to.
_FIRST = 5


def read_run(path: str | Path) -> dict[str, list[float]]:
    """Returns the columns of a log that a `CurvatureLog` wrote.

    Args:
        path: ends in ``.csv`` or ``.jsonl``.

    Raises:
        ValueError: it isn't such a log; names the file.
        OSError: it can't be read.
    """
    path = Path(path)
    columns: dict[str, list[float]] = {}
    count = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                rows = (json.loads(line) for line in file if line.strip())
            elif path.suffix == ".csv":
                rows = iter(csv.DictReader(file))
            else:
                raise ValueError("expected a .csv or .jsonl file of a CurvatureLog")
            for row in rows:
                for name, value in row.items():
                    # A column that begins late.
                    column = columns.setdefault(name, [math.nan] * count)
                    column.append(math.nan if value is None else float(value))
                count += 1
                for column in columns.values():
                    column += [math.nan] * (count - len(column))
            if not count:
                raise ValueError("it holds no measurements yet")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a log of curvature: {error}") from error
    if "step" not in columns or not names_of(columns):
        raise ValueError(f"{path}: not a log of curvature: it has no columns step and h")
    return columns


def names_of(run: Run) -> list[str]:
    """The curvatures that a run has: ``h``; with k > 1 ``h_0``, ``h_1``, …"""
    return [name for name in run if name == "h" or name.removeprefix("h_").isdecimal()]


def draw_curvature(ax: Axes, run: Run, label: str = "") -> None:
    """Draws the eigenvalues with their intervals, and what would be stable.

    Args:
        ax: to draw on.
        run: columns: ``step``, ``h``; with ``h_low`` and ``h_high`` the interval is drawn, with
            ``edge`` the curvature at which it would be 1.
        label: of the run, where there are several.
    """
    step = _array(run["step"])
    colours = [BLUE, GREEN, ORANGE, PURPLE]
    shown = []
    for i, name in enumerate(names_of(run)):
        suffix, h = name.removeprefix("h"), _array(run[name])
        colour = None if label else colours[i % len(colours)]
        text = "largest Hessian eigenvalue" if name == "h" else f"eigenvalue {name[2:]}"
        (line,) = ax.plot(step, h, color=colour, linewidth=1.4, label=label or text)
        low, high = run.get(f"h_low{suffix}"), run.get(f"h_high{suffix}")
        if low is not None and high is not None:
            bounds = _array(low), _array(high)
            band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            ax.fill_between(step, *bounds, **band, label=None if label or i else "its interval")
        shown.append(h)
    stable = _stable(run)
    if stable is not None and not label:
        ax.plot(step, stable, "--", color=RED, linewidth=1.2, label="above this a step overshoots")
        near = stable[stable < 3.0 * _largest(shown)]
        shown.append(near)
    ax.set_ylim(*_room(shown))
    ax.set_ylabel("curvature")
    ax.legend(frameon=False, fontsize="small", loc="best")
    tidy(ax)


def draw_run(figure: Figure, run: Run | Mapping[str, Run]) -> list[Axes]:
    """Draws a run, or several by name: curvature, edge, loss and rate, as far as they are there.

    Args:
        figure: an empty one.
        run: columns, as `read_run` returns them; or a mapping of names to such.

    Returns:
        The axes, the curvature's first.
    """
    several = isinstance(next(iter(run.values())), Mapping)
    runs: Mapping[str, Run] = run if several else {"": run}  # type: ignore[assignment]
    panels = [("curvature", None)]
    for title, names, colour in (
        (EDGE, ("edge",), PURPLE),
        ("loss", ("loss",), GREEN),
        ("learning rate", RATES, ORANGE),
    ):
        if any(name in columns for columns in runs.values() for name in names):
            panels.append((title, (names, colour)))
    grid = figure.subplot_mosaic(_GRIDS[len(panels)], sharex=True)
    axes = [grid[letter] for letter in "abcd"[: len(panels)]]
    for ax, (title, what) in zip(axes, panels, strict=True):
        for label, one in runs.items():
            if what is None:
                draw_curvature(ax, one, label)
            else:
                _draw_column(ax, title, one, what[0], what[1] if not label else None)
        if title == EDGE:
            ax.axhline(1.0, color=RED, linestyle="--", linewidth=1.2)
        if title == EDGE or (what is None and several):
            ax.set_ylim(*_room([_array(line.get_ydata()) for line in ax.lines]))
        if ax.get_subplotspec().is_last_row():
            ax.set_xlabel("training step")
    return axes


def save_run(run: Run | Mapping[str, Run], path: str | Path, dpi: int = 100) -> None:
    """Writes the picture of a run, or of several by name, as `draw_run` draws it.

    Args:
        run: columns, as `read_run` returns them; or a mapping of names to such.
        path: whose suffix chooses the format. An old file is replaced once the new one is whole.
        dpi: dots per inch, of 9 to 4.6 inches.
    """
    figure = new_figure(*SIZE, dpi=dpi, layout="constrained")
    draw_run(figure, run)
    path = Path(path)
    replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:]))


def _draw_column(ax: Axes, title: str, run: Run, names: Sequence[str], colour: str | None) -> None:
    for name in names:
        if name in run:
            values = _array(run[name])
            ax.plot(_array(run["step"]), values, color=colour, linewidth=1.2)
            if title == "loss" and (values[np.isfinite(values)] > 0).all():
                ax.set_yscale("log")
    ax.set_ylabel("edge: 1 is the limit" if title == EDGE else title)
    tidy(ax)


def _array(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=float)


def _stable(run: Run) -> np.ndarray | None:
    """The curvature at which the edge would be 1; None where the run has no edge."""
    leading = "h" if "h" in run else "h_0"
    if "edge" not in run or leading not in run:
        return None
    h, edge = _array(run[leading]), _array(run["edge"])
    with np.errstate(divide="ignore", invalid="ignore"):
        stable = np.where(edge > 0, h / edge, np.nan)
    return stable if np.isfinite(stable).any() else None


def _largest(shown: Sequence[np.ndarray]) -> float:
    """The largest value but for the first measurements; 1 where there is none."""
    values = [float(v[_FIRST:][np.isfinite(v[_FIRST:])].max(initial=0.0)) for v in shown]
    return max(values, default=0.0) or 1.0


def _room(shown: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits of an axis that show all but the first measurements."""
    later = [v[_FIRST:] if len(v) > 2 * _FIRST else v for v in shown]
    low = min((float(v[np.isfinite(v)].min(initial=0.0)) for v in later), default=0.0)
    high = max((float(v[np.isfinite(v)].max(initial=0.0)) for v in later), default=1.0)
    margin = 0.08 * (high - low) or 1.0
    return (low - margin if low < 0 else 0.0), high + margin
