"""What the CUDA backend is meant to reach, and what the rows of a run say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu.tables import Row, beyond, of_copy, times


@dataclass(frozen=True)
class Goal:
    """A bound for a value of one row."""

    text: str
    table: str
    of: dict[str, object]
    value: Callable[[Row], float | None]
    least: float | None = None
    most: float | None = None
    form: str = "{:.0%}"

    def reached(self, rows: Sequence[Row]) -> tuple[str, str]:
        """(what was reached, whether that is the goal)"""
        wanted = {"table": self.table, **self.of}
        found = [row for row in rows if wanted.items() <= row.items()]
        value = self.value(found[-1]) if found else None
        if value is None:
            return "not measured", "-"
        met = value >= self.least if self.least is not None else value <= self.most
        return self.form.format(value), "yes" if met else "no"


LARGE = 10**8
UPDATE = {"job": "update", "numel": LARGE}
GOALS = (
    Goal("update: at least 95 % of a copy", "vector work", UPDATE, of_copy, 0.95),
    Goal(
        "update: at least 3 times as fast as tuned eager",
        *("vector work", UPDATE, lambda row: times(row, "tuned"), 3.0),
        form="{:.1f}×",
    ),
    Goal(
        "update: at least 1.3 times as fast as torch.compile",
        *("compiled", UPDATE, lambda row: times(row, "compiled"), 1.3),
        form="{:.1f}×",
    ),
    Goal(
        "step of k = 14: at least 80 % of its floor at the copy's rate",
        *("panel step", {"k": 14, "numel": LARGE}, of_copy, 0.8),
    ),
    Goal(
        "step of k = 14: at least 10 times as fast as eager Gram-Schmidt",
        *("panel step", {"k": 14, "numel": LARGE}, lambda row: times(row, "gram schmidt"), 10.0),
        form="{:.1f}×",
    ),
    *(
        Goal(
            f"{model}: vector work at most 3 % of a plain step",
            *("training", {"model": model}, lambda row: beyond(row) / row["seconds"]["plain"]),
            most=0.03,
            form="{:.1%}",
        )
        for model in ("ResNet-18, TF32", "ResNet-18, no TF32")
    ),
)


def table(rows: Sequence[Row], made_up: bool = False) -> list[str]:
    """The goals beside what was reached; by made-up times none is."""
    lines = ["| goal, at N = 1e8 | reached | met |", "|---|---|---|"]
    for goal in GOALS:
        reached, met = goal.reached(rows)
        lines.append(f"| {goal.text} | {reached} | {'made up' if made_up else met} |")
    return lines
