"""Figures, axes and colours; where a picture goes: to the user's axes, to pyplot's, to a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyapcuda.arguments import described
from lyapcuda.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "PURPLE",
    "RED",
    "axes_for",
    "new_figure",
    "png_of",
    "require_matplotlib",
    "tidy",
]

# Okabe-Ito, but for a darker red: they stay apart for every reader.
BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#C8102E", "#009E73"
PURPLE = "#8F3F97"


def require_matplotlib() -> None:
    """Import matplotlib or say how to get it.

    Raises:
        ImportError: it is missing, naming the extra that brings it.
    """
    require("matplotlib", "a plot")


def new_figure(width: float = 7.6, height: float = 4.6, dpi: int = 150) -> Figure:
    """Returns an empty figure of a white ground, in inches.

    It isn't pyplot's: no window system, no state shared with the caller's own plots.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor="white")


def axes_for(ax: Axes | None, what: str, width: float = 7.0, height: float = 4.0) -> Axes:
    """Returns the axes to draw on: the user's, or those of a new figure of pyplot's.

    Args:
        ax: the user's; None for new ones, which a notebook shows and ``plt.show()`` does.
        what: draws, for messages: "plot()".
        width, height: of a new figure, in inches.

    Raises:
        ImportError: without matplotlib.
        TypeError: ``ax`` is something else.
    """
    if ax is None:
        pyplot = require("matplotlib.pyplot", what)
        return pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    if not hasattr(ax, "fill_between"):
        raise TypeError(f"ax={described(ax)}: expected matplotlib axes, as of plt.subplots()")
    return ax


def png_of(draw: Callable[[Figure], Any], width: float = 7.0, height: float = 4.0) -> bytes | None:
    """Returns what ``draw`` draws on a new figure as PNG; None without matplotlib."""
    try:
        figure = new_figure(width, height, dpi=100)
    except ImportError:
        return None
    figure.set_layout_engine("constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def saved(draw: Callable[[Figure], Any], path: str | Path, width: float, height: float) -> Path:
    """Draws on a new figure and saves it; the path's suffix chooses the format."""
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained")
    draw(figure)
    figure.savefig(path)
    return Path(path)


def tidy(ax: Axes) -> None:
    """Light lines behind, no frame above and to the right."""
    ax.grid(which="major", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
