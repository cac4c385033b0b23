"""The tables of the report: which lines each is made of, and what stands in its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of one kind."""

    title: str
    columns: Sequence[str]
    cells: Callable[[Row], Sequence[str]]
    note: str = ""

    def markdown(self, rows: Sequence[Row]) -> list[str]:
        lines = [f"## {self.title}", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(self.cells(row)) + " |" for row in rows]
        return [*lines, "", self.note, ""] if self.note else [*lines, ""]


def rate(row: Row) -> float:
    """GB/s: the bytes that have to move over the time taken."""
    return row["bytes"] / row["seconds"]["ours"] / 1e9


def of_copy(row: Row) -> float:
    """The rate as a part of that of a copy in the same round."""
    return rate(row) / (row["copy_bytes"] / row["seconds"]["copy"] / 1e9)


def times(row: Row, form: str) -> float | None:
    """How many times as long a form takes as ours."""
    other = row["seconds"].get(form)
    return None if other is None else other / row["seconds"]["ours"]


def _times(row: Row, *forms: str) -> list[str]:
    found = [times(row, form) for form in forms]
    return ["-" if value is None else f"{value:.1f}×" for value in found]


def _ours(row: Row) -> list[str]:
    copy = f"{of_copy(row):.0%}" if "copy" in row["seconds"] else "-"
    return [f"{row['seconds']['ours'] * 1e6:.1f}", f"{rate(row):.0f}", copy]


def _copies(row: Row) -> list[str]:
    seconds, size = row["seconds"], row["bytes"] / 1e9
    forms = ("copy", "product")
    return [f"{row['numel']:.0e}", *(f"{size / seconds[form]:.0f}" for form in forms)]


def _vector_job(row: Row) -> list[str]:
    return [row["job"], f"{row['numel']:.0e}", *_ours(row), *_times(row, "eager", "tuned")]


def _one_op(row: Row) -> list[str]:
    return [row["op"], f"{row['numel']:.0e}", row["storage"], *_ours(row)]


def _training(row: Row) -> list[str]:
    whole, plain = row["seconds"], row["seconds"]["plain"]
    return [
        row["model"],
        f"{plain * 1e3:.2f}",
        *(f"{whole[form] / plain - 1:+.0%}" for form in ("tracked", "tracked, every=10")),
        f"{beyond(row) * 1e3:+.2f}",
        f"{beyond(row) / plain:+.1%}",
        f"{row['spread']:.1%}",
    ]


def beyond(row: Row) -> float:
    """Seconds of a tracked step that are not the plain step or its one gradient more."""
    seconds = row["seconds"]
    return seconds["tracked"] - seconds["plain"] - seconds["one gradient"]


def _panel_step(row: Row) -> list[str]:
    return [str(row["k"]), f"{row['numel']:.0e}", *_ours(row), *_times(row, "gram schmidt")]


def _panel_op(row: Row) -> list[str]:
    products = row["products"] / row["seconds"]["ours"] / 1e9
    return [
        *(row["op"], str(row["k"]), f"{row['numel']:.0e}", *_ours(row)),
        *(f"{products:.0f}" if products else "-", *_times(row, "eager", "tuned")),
    ]


def _scalars(row: Row) -> list[str]:
    return [str(row["k"]), f"{row['seconds']['ours'] * 1e6:.1f}"]


def _graph(row: Row) -> list[str]:
    both = [f"{row['seconds'][form] * 1e6:.1f}" for form in ("eager", "graph")]
    return [f"{row['numel']:.0e}", str(row["tensors"]), *both]


def _compiled(row: Row) -> list[str]:
    ours = f"{row['seconds']['ours'] * 1e6:.1f}"
    return [row["job"], str(row["k"]), f"{row['numel']:.0e}", ours, *_times(row, "compiled")]


def _counters(row: Row) -> list[str]:
    values = [f"{row[name]:.{digits}f}" if name in row else "-" for name, digits in COUNTERS]
    return [row["kernel"], *values, ", ".join(row.get("stalls", ()))]


#: Counters of a kernel, and the digits after the point.
COUNTERS = (("dram %", 1), ("µs", 1), ("registers", 0), ("warps %", 1))
FORMS = ("eager", "tuned eager")
OURS = ("µs", "GB/s", "of copy")
TABLES = {
    "copy": Table("Copy, GB/s", ("N", "torch's copy_", "a product by 1"), _copies),
    "vector work": Table(
        "Vector work of a step, float32",
        ("job", "N", *OURS, *FORMS),
        _vector_job,
        "The last columns: their time over ours (`bench/ops.py` says what each form does).",
    ),
    "one separation": Table("Ops of one separation", ("op", "N", "storage", *OURS), _one_op),
    "training": Table(
        "Training steps",
        ("step", "plain, ms", "tracked", "every=10", "vector work, ms", "of plain", "spread"),
        _training,
        "Vector work: a tracked step without the plain one and without one gradient more. Spread: "
        "how far the two rounds of one form lie apart at most.",
    ),
    "panel step": Table(
        "A step of k separations: ascent, orthonormalisation, re-centring",
        ("k", "N", *OURS, "eager Gram-Schmidt"),
        _panel_step,
        "GB/s of the floor, 24k + 8 bytes a parameter (docs/traffic.md).",
    ),
    "panels": Table(
        "Ops over panels",
        ("op", "k", "N", *OURS, "Gproducts/s", *FORMS),
        _panel_op,
        "The last columns: their time over ours; their sums are float32, ours float64.",
    ),
    "benettin_": Table("benettin_: the scalars of k separations", ("k", "µs"), _scalars),
    "graphs": Table("CUDA graphs", ("N", "tensors", "two steps, µs", "as a graph, µs"), _graph),
    "compiled": Table(
        "Against torch.compile", ("job", "k", "N", "ours, µs", "torch.compile"), _compiled
    ),
    "counters": Table(
        "Counters", ("kernel", *(name for name, _ in COUNTERS), "most stalled by"), _counters
    ),
}
