"""What the modules beside this one share: trackers by their options, what they said beside exact
values, and the errors of that.
"""

from __future__ import annotations

import ast
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import lyapcuda

RESULTS = Path(__file__).parents[1] / "results"
DEFAULT = "default"

Modes = dict[str, dict[str, Any]]
#: (run, step) → the loss there as it was written, and the exact values.
Known = dict[tuple[str, int], tuple[str, list[float]]]


def modes_of(texts: Iterable[str] = (DEFAULT,)) -> Modes:
    """A tracker's options for each text: "default", or such as "tol=0.1,iterations=4"."""
    found: Modes = {}
    for text in texts:
        found[text] = {}
        for part in [] if text == DEFAULT else text.split(","):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"{text!r}: expected name=value, joined by commas")
            try:
                found[text][name.strip()] = ast.literal_eval(value)
            except ValueError:  # a word without quotes
                found[text][name.strip()] = value
    return found


@dataclass(frozen=True)
class Row:
    """One value of one tracker at one step, beside the exact one.

    Attributes:
        run: which training run.
        mode: the tracker's options.
        value: its index, from the outer end inwards.
        gradients: taken so far beside those at θ, where the tracker counts them.
    """

    run: str
    mode: str
    step: int
    loss: str
    value: int
    exact: float
    h: float
    rayleigh: float
    residual: float
    schwarz: float
    h_error: float
    gradients: float

    @property
    def secant(self) -> float:
        """‖y‖/‖q‖, with the sign of the Rayleigh quotient."""
        return math.copysign(math.sqrt(max(self.rayleigh * self.schwarz, 0.0)), self.rayleigh)

    def off(self, name: str) -> float:
        """|tracked/exact − 1|"""
        return abs(getattr(self, name) / self.exact - 1)


def written(loss: Tensor) -> str:
    """A loss with all of its float32 digits: the same one is that of the same θ and minibatch."""
    return f"{float(loss.detach()):.9g}"


def read(
    tracker: lyapcuda.CurvatureTracker,
    run: str,
    mode: str,
    step: int,
    loss: Tensor,
    exact: Sequence[float],
) -> list[Row]:
    """A row for every value of the tracker."""

    def values(name: str) -> list[float]:
        found = getattr(tracker, name, None)
        return [math.nan] * len(exact) if found is None else found.reshape(-1).tolist()

    names = ("h", "rayleigh", "residual", "schwarz", "h_error")
    columns = zip(exact, *(values(name) for name in names), strict=True)
    gradients = float(getattr(tracker, "gradients", math.nan))
    return [
        Row(run, mode, step, written(loss), i, *column, gradients)
        for i, column in enumerate(columns)
    ]


def load(path: Path) -> list[Row]:
    """The rows of a file; none, where there is no file."""
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in fields(Row)}
    casts = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{name: casts[kinds[name]](text) for name, text in row.items()}) for row in lines]


def keep(path: Path, rows: list[Row]) -> list[Row]:
    """Writes them beside those that the file has of other runs and modes; returns all."""
    new = {(row.run, row.mode) for row in rows}
    rows = [*(row for row in load(path) if (row.run, row.mode) not in new), *rows]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            cells = asdict(row).values()
            writer.writerow([f"{x:.7g}" if isinstance(x, float) else x for x in cells])
    return rows


def known(path: Path) -> Known:
    """The exact values that an earlier run has found: the training is the same in every mode."""
    found: Known = {}
    for row in load(path):
        key = row.run, row.step
        if row.value == 0:
            found[key] = row.loss, [row.exact]
        elif len(found[key][1]) == row.value:
            found[key][1].append(row.exact)
    return found


def recall(found: Known, run: str, step: int, loss: Tensor) -> list[float] | None:
    """The exact values there, unless the loss says that it was another θ."""
    before, exact = found.get((run, step), ("", []))
    return exact if before == written(loss) else None


def percent(errors: Sequence[float]) -> str:
    """Median and 90th percentile."""
    return f"{statistics.median(errors):.1%} ({np.quantile(errors, 0.9):.0%})"


def coverage(rows: list[Row]) -> str:
    """How often h ± h_error held the exact value, and the median of h_error/|exact|."""
    rows = [row for row in rows if math.isfinite(row.h_error)]
    if not rows:
        return "–"
    inside = statistics.fmean(abs(row.h - row.exact) <= row.h_error for row in rows)
    return f"{inside:.0%} ({statistics.median(r.h_error / abs(r.exact) for r in rows):.1%})"


def spent(rows: list[Row]) -> str:
    """Gradients a step beside the one at θ, the mean over the runs between first and last row."""
    means = []
    for run in dict.fromkeys(row.run for row in rows):
        of = [row for row in rows if row.run == run]
        first, last = of[0], of[-1]
        if last.step > first.step:
            means.append((last.gradients - first.gradients) / (last.step - first.step))
    return f"{statistics.fmean(means):.2f}" if means and math.isfinite(sum(means)) else "–"


def errors(rows: list[Row]) -> str:
    """Cells of a table: the errors of h, Schwarz quotient and secant; coverage; gradients."""
    names = ("h", "schwarz", "secant")
    cells = [percent([row.off(name) for row in rows]) for name in names]
    return " | ".join([*cells, coverage(rows), spent(rows)])


#: The heads of what `errors` gives.
ERRORS = "h | Schwarz | secant | h_error holds it | gradients a step"


def table(head: str, lines: list[str]) -> list[str]:
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *lines, ""]
