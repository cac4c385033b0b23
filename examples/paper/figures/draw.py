"""The pictures: a figure's panels on one sheet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lyapcuda.files import replace_file
from lyapcuda.plots.figure import BLUE, GREEN, ORANGE, PURPLE, new_figure

from ..plots import draw_curves
from .table import Figure, Panel, Spectrum

_DPI = 80
_PANEL = (3.5, 2.5)  # inches
_FONT = 8
_LEGEND = 0.5  # inches
_COLOURS = 64


@dataclass(frozen=True)
class RunPicture:
    """A run's curves."""

    horizontal = "epochs"

    panel: Panel
    columns: dict[str, np.ndarray]
    numbers: dict[str, Any]

    def draw(self, axes: Any) -> list[Any]:
        """Draw on axes; returns the curves."""
        faithful = self.panel.faithful
        lines = draw_curves(axes, self.columns, unbiased=faithful, width=0.9, labels=False)
        # A cold start's 1/h0 of thousands, and spikes, would press the rest together.
        rate = self.columns["lr"]
        rate = rate[np.isfinite(rate) & (rate > 0)]
        if len(rate) and axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, rate.min() / 20), min(high, 10 * max(1.0, rate.max())))
        return lines

    @property
    def title(self) -> str:
        if self.numbers["diverged"]:
            return f"{self.panel.title} (diverged)"
        if not self.numbers["finished"]:
            return f"{self.panel.title} (unfinished)"
        return self.panel.title


@dataclass(frozen=True)
class SpectrumPicture:
    """Eigenvalues by their number."""

    horizontal = "number"

    panel: Spectrum
    numbers: dict[str, Any]

    def draw(self, axes: Any) -> list[Any]:
        """Draw on axes; returns the curves."""
        numbers = self.numbers
        index = np.arange(1, self.panel.k + 1)
        style = {"marker": "o", "markersize": 3, "linewidth": 0.9}
        lines = axes.plot(index, numbers["printed"], color=ORANGE, label="as printed", **style)
        lines += [
            axes.errorbar(
                index,
                numbers["unbiased"],
                yerr=numbers["unbiased_spread"],
                color=PURPLE,
                label="unbiased ± spread over the epoch",
                **style,
            )
        ]
        if numbers["exact"] is not None:
            lines += axes.plot(
                index,
                numbers["exact"],
                color=GREEN,
                linestyle="none",
                marker="x",
                markersize=4,
                label="Lanczos after the epoch",
            )
        axes.axhline(0.0, color=BLUE, linewidth=0.6)
        axes.set_ylabel("eigenvalue", fontsize=_FONT)
        return lines

    @property
    def title(self) -> str:
        return self.panel.title


@dataclass(frozen=True)
class Missing:
    """The place of a panel that wasn't run."""

    panel: Panel | Spectrum
    horizontal = ""

    def draw(self, axes: Any) -> list[Any]:
        """Say so; there are no curves."""
        axes.text(0.5, 0.5, "not run", ha="center", va="center", fontsize=_FONT)
        axes.set(xticks=[], yticks=[])
        return []

    @property
    def title(self) -> str:
        return self.panel.title


def draw_figure(
    figure: Figure, pictures: Sequence[RunPicture | SpectrumPicture | Missing], to: Path
) -> None:
    """Draw a figure of the paper and write it as PNG.

    Args:
        figure: the figure.
        pictures: one for each of its panels, in their order.
        to: the file to make or replace.
    """
    columns = min(figure.columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height = _PANEL[1] * rows + _LEGEND
    sheet = new_figure(_PANEL[0] * columns, height, _DPI)
    sheet.set_layout_engine("constrained", rect=(0, _LEGEND / height, 1, 1 - _LEGEND / height))
    handles: dict[str, Any] = {}
    for place, picture in enumerate(pictures, 1):
        axes = sheet.add_subplot(rows, columns, place)
        handles |= {line.get_label(): line for line in picture.draw(axes)}
        axes.set_title(picture.title, fontsize=_FONT + 1)
        if place > len(pictures) - columns:
            axes.set_xlabel(picture.horizontal, fontsize=_FONT)
    for axes in sheet.axes:  # the loss's too
        axes.tick_params(which="both", labelsize=_FONT - 1)
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            tick = _tick if high / low > 10 else _every_tick
            axes.yaxis.set_major_formatter(tick)
            axes.yaxis.set_minor_formatter(tick)
    sheet.legend(
        handles.values(),
        handles,
        loc="lower center",
        ncols=-(-len(handles) // (2 if columns < 3 else 1)),
        frameon=False,
        fontsize=_FONT + 1,
    )
    replace_file(to, lambda file: _save(sheet, file))


def _tick(value: float, _: int) -> str:
    # "5 × 10⁻¹" is too wide, and there is no room for every one.
    return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""


def _every_tick(value: float, _: int) -> str:
    return f"{value:g}"


def _save(sheet: Any, file: BinaryIO) -> None:
    # Few colours are in it: a palette makes a third of the bytes.
    from PIL import Image

    whole = io.BytesIO()
    sheet.savefig(whole, format="png")
    Image.open(whole).convert("RGB").quantize(_COLOURS).save(file, "PNG", optimize=True)
