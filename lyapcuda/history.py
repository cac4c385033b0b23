"""What a tracker measured, step by step: a ring buffer on the device, columns on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lyapcuda.arguments import described, whole
from lyapcuda.dynamics.separations import (
    End,
    Separations,
    joined,
    per_value,
    scalar_fields,
    schwarz_quotient,
)
from lyapcuda.params.saved_state import require_entries, require_list
from lyapcuda.plots.figure import drawn, plotted, png_of
from lyapcuda.plots.run import SIZE as _SIZE
from lyapcuda.plots.run import draw_curvature, draw_run
from lyapcuda.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CurvatureHistory", "Ring"]

#: Of each row, before the separations' scalars; the edge only where there is one.
_OWN = ("step", "loss")


@dataclass(frozen=True, repr=False)
class CurvatureHistory:
    """Measurements in their order, on the host; n rows, the oldest first.

    Attributes:
        step: int64 (n,), which call of ``step`` (or of an attached optimizer's) it was, from 1.
        loss: float64 (n,), what that call returned.
        h, h_ema, h_error, rayleigh, residual, schwarz, exponent: float64 (n,), for k > 1 (n, k), as
            the tracker's properties of those names were after it.
        interval: float64 (n, 2), for k > 1 (n, k, 2).
        beta: float64 (n,), for "BE" (n, 2).
        accepted: bool (n,), False where a loss or gradient wasn't finite: the values are then the
            ones of before. For "BE" both ends have to be.
        overwritten: how many older measurements the buffer no longer holds.
        edge: float64 (n,), the tracker's ``edge`` at the rate of that step; None without one.
    """

    step: Tensor
    loss: Tensor
    h: Tensor
    h_ema: Tensor
    h_error: Tensor
    interval: Tensor
    rayleigh: Tensor
    residual: Tensor
    schwarz: Tensor
    exponent: Tensor
    beta: Tensor
    accepted: Tensor
    overwritten: int = 0
    edge: Tensor | None = None

    def __len__(self) -> int:
        return len(self.step)

    def __repr__(self) -> str:
        lines = [f"CurvatureHistory of {len(self)} measurements", *aligned(self._last(), ">" * 9)]
        return "\n".join(lines if len(self) else lines[:1])

    def _repr_png_(self) -> bytes | None:
        return png_of(self._draw, *_SIZE) if len(self) else None

    def _last(self, count: int = 3) -> list[tuple[str, ...]]:
        """A table of the newest measurements: its head, and a row each."""
        names = ("step", "loss", "h", "h_low", "h_high", "edge")
        columns = self.columns()
        kept = [n for n in columns if n in names or n.rpartition("_")[0] in names[2:5]][:9]
        rows = zip(*(columns[name][-count:] for name in kept), strict=True)
        return [tuple(kept), *(tuple(f"{value:.6g}" for value in row) for row in rows)]

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Axes | list[Axes]:
        """Draws the run: curvature and what is stable, edge, loss. On axes of yours the curvature
        alone.

        Args:
            path: where to save it as a picture of its own; the suffix chooses the format.
            ax: matplotlib axes to draw on. None for those of a new figure.

        Returns:
            The axes; all of them, the curvature's first, where there are several.

        Raises:
            ImportError: matplotlib isn't installed.
            TypeError: ``ax`` is something else.
            ValueError: both a path and axes.
        """
        if ax is not None:
            return plotted(lambda ax: draw_curvature(ax, self.columns()), path, ax, "plot()")
        return drawn(self._draw, path, "plot()", *_SIZE)

    def _draw(self, figure: Figure) -> list[Axes]:
        return draw_run(figure, self.columns())

    def columns(self) -> dict[str, list[float | int | bool]]:
        """A list of n numbers under every name; with k > 1 ``h_0``, ``h_1``, … and so on."""
        out: dict[str, list[float | int | bool]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "overwritten" or value is None:
                continue
            if field.name == "interval":
                out |= _spread("h_low", value[..., 0]) | _spread("h_high", value[..., 1])
            else:
                out |= _spread(field.name, value)
        return out


def _spread(name: str, values: Tensor) -> dict[str, list[Any]]:
    if values.dim() == 1:
        return {name: values.tolist()}
    return {f"{name}_{i}": column.tolist() for i, column in enumerate(values.unbind(1))}


class Ring:
    """The last measurements of a tracker, written without waiting for the device.

    Positions and step numbers are counted on the device: a CUDA graph's replays count as well.

    Args:
        capacity: how many rows are kept.
        device: the tracker's.
        ends: of the spectrum, that it follows.
        edge: whether `record` is given the edge, too.
    """

    def __init__(
        self, capacity: int, device: torch.device, ends: Sequence[End], edge: bool = False
    ) -> None:
        self.capacity, self._ks = capacity, [end.k for end in ends]
        self._own = len(_OWN) + edge
        self._fields = [scalar_fields(k) for k in self._ks]
        self._widths = [max(place.stop for place in fields.values()) for fields in self._fields]
        self._width = self._own + sum(self._widths)
        self._oldest = 0  # number of the first measurement that a loaded state still held
        self._clock = torch.zeros(1, dtype=torch.float64, device=device)
        self._recorded = torch.zeros(1, dtype=torch.int64, device=device)
        self._rows = torch.zeros(capacity, self._width, dtype=torch.float64, device=device)

    def tick(self) -> None:
        """Counts a step, measured or not."""
        self._clock.add_(1.0)

    def record(self, loss: Tensor, separations: Separations, edge: Tensor | None = None) -> None:
        """Keeps what the separations' states hold now."""
        scalars = [
            state[:width].to(self._rows.device)
            for state, width in zip(separations.states, self._widths, strict=True)
        ]
        own = [loss] if edge is None else [loss, edge]
        row = torch.cat([self._clock, *(x.to(self._rows).reshape(1) for x in own), *scalars])
        self._rows.index_copy_(0, self._recorded.remainder(self.capacity), row[None])
        self._recorded.add_(1)

    @property
    def recorded(self) -> int:
        """How many measurements were ever recorded. Waits for the device."""
        return int(self._recorded)

    def _last(self, count: int) -> Tensor:
        """The newest rows, in order, on the device."""
        end = self.recorded
        kept = min(end - self._oldest, self.capacity, max(count, 0))
        return self._rows[torch.arange(end - kept, end, device=self._rows.device) % self.capacity]

    def read(self, after: int = 0) -> CurvatureHistory:
        """The measurements from number ``after`` (0: the first ever) on that are still held."""
        end = self.recorded
        rows = self._last(end - after).cpu()
        overwritten = end - after - len(rows)
        tables = rows[:, self._own :].split(self._widths, 1)

        def parts(name: str) -> list[Tensor]:
            return [
                table[:, fields[name]] for table, fields in zip(tables, self._fields, strict=True)
            ]

        def values(name: str) -> Tensor:
            return joined(parts(name))

        center, half = values("center"), values("width")
        rayleigh, residual = values("rayleigh"), values("residual")
        return CurvatureHistory(
            step=rows[:, 0].long(),
            loss=rows[:, 1].clone(),
            interval=per_value(torch.stack([center - half, center + half], -1), 1),
            beta=per_value(torch.cat(parts("beta"), 1), 1),
            accepted=torch.cat(parts("accepted"), 1).bool().all(1),
            overwritten=max(overwritten, 0),
            edge=rows[:, 2].clone() if self._own > len(_OWN) else None,
            h_error=per_value(values("error"), 1),
            rayleigh=per_value(rayleigh, 1),
            residual=per_value(residual, 1),
            schwarz=per_value(schwarz_quotient(rayleigh, residual), 1),
            **{name: per_value(values(name), 1) for name in ("h", "h_ema", "exponent")},
        )

    def state_dict(self) -> dict[str, Any]:
        """What is held, oldest first, and the counters: plain numbers, since their count changes.

        (Checkpoints of torch.distributed load tensors in place, of the size that they had.)
        """
        return {
            "ks": list(self._ks),
            "rows": self._last(self.capacity).tolist(),
            "clock": self._clock.item(),
            "recorded": self.recorded,
        }

    def check(self, saved: Any) -> None:
        """Raises a ValueError where `load_state_dict` would not fit."""
        require_entries(saved, "ks", "rows", "clock", "recorded")
        require_list("history's rows", saved["rows"], list)
        whole("state_dict: history's recorded", saved["recorded"], 0)
        if not isinstance(saved["clock"], float):
            raise ValueError(f"state_dict: history's clock is {described(saved['clock'])}")
        widths = {len(row) for row in saved["rows"]}
        if saved["ks"] != self._ks or not widths <= {self._width}:
            raise ValueError(
                f"state_dict: history of rows of {sorted(widths)} numbers, expected {self._width}"
            )
        if not all(isinstance(x, float) for row in saved["rows"] for x in row):
            raise ValueError("state_dict: history's rows hold something that is no number")
        if len(saved["rows"]) > saved["recorded"]:
            raise ValueError(
                f"state_dict: history of {len(saved['rows'])} rows, "
                f"but {saved['recorded']} recorded"
            )

    def restart(self, clock: int) -> None:
        """Holds nothing, after so many steps."""
        self._oldest = 0
        self._rows.zero_()
        self._recorded.zero_()
        self._clock.fill_(clock)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over a `state_dict`, of another capacity as well: then what fits of it."""
        self.check(saved)
        end = saved["recorded"]
        rows = torch.tensor(saved["rows"][-self.capacity :], dtype=torch.float64)
        rows = rows.reshape(-1, self._width).to(self._rows.device)
        self._rows.zero_()
        self._oldest = end - len(rows)
        where = torch.arange(self._oldest, end, device=self._rows.device) % self.capacity
        self._rows[where] = rows
        self._clock.fill_(saved["clock"])
        self._recorded.fill_(end)
