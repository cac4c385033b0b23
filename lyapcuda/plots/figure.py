"""Figures and colours; where a picture goes: to the user's axes, to pyplot, or to a file."""

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
    "Plotted",
    "drawn",
    "new_figure",
    "plotted",
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


def new_figure(
    width: float = 7.6, height: float = 4.6, dpi: int = 150, layout: str | None = None
) -> Figure:
    """Returns an empty figure of a white ground, in inches; ``layout`` as matplotlib's.

    It isn't pyplot's: no window system, no state shared with the caller's own plots.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)


def png_of(draw: Callable[[Figure], Any], width: float = 7.0, height: float = 4.0) -> bytes | None:
    """Returns what ``draw`` draws on a new figure as PNG; None without matplotlib."""
    try:
        figure = new_figure(width, height, dpi=100, layout="constrained")
    except ImportError:
        return None
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def drawn(
    draw: Callable[[Figure], Any], path: str | Path | None, what: str, width: float, height: float
) -> Any:
    """Draws on a new figure, pyplot's or a file's; returns what ``draw`` returns.

    Args:
        draw: draws on an empty figure.
        path: of a file, whose suffix chooses the format; pyplot doesn't hear of it.
        what: draws, for messages.
        width, height: in inches.
    """
    if path is None:
        pyplot = require("matplotlib.pyplot", what)
        figure = pyplot.figure(figsize=(width, height), layout="constrained")
    else:
        figure = new_figure(width, height, layout="constrained")
    found = draw(figure)
    if path is not None:
        figure.savefig(path)
    return found


def plotted(
    draw: Callable[[Axes], Any],
    path: str | Path | None,
    ax: Axes | None,
    what: str,
    width: float = 7.0,
    height: float = 4.0,
) -> Axes:
    """Draws on axes: the user's, or those of a figure as of `drawn`; returns them.

    Raises:
        TypeError: ``ax`` is something else.
        ValueError: both a path and axes.
    """

    def alone(figure: Figure) -> Axes:
        axes = figure.subplots()
        draw(axes)
        return axes

    if ax is None:
        return drawn(alone, path, what, width, height)
    if path is not None:
        raise ValueError("path, ax: a file of its own, or axes of yours: pass one of them")
    if not hasattr(ax, "fill_between"):
        raise TypeError(f"ax={described(ax)}: expected matplotlib axes, as of plt.subplots()")
    draw(ax)
    return ax


class Plotted:
    """What draws itself on axes: `plot`, of a `_draw` that derived classes have."""

    def _draw(self, ax: Axes) -> None:
        raise NotImplementedError

    def plot(self, path: str | Path | None = None, *, ax: Axes | None = None) -> Axes:
        """Draws it, see the class.

        Args:
            path: where to save it as a picture of its own; the suffix chooses the format.
            ax: matplotlib axes to draw on. None for those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib isn't installed.
            TypeError: ``ax`` is something else.
            ValueError: both a path and axes.
        """
        return plotted(self._draw, path, ax, "plot()")


def tidy(ax: Axes) -> None:
    """Light lines behind, no frame above and to the right."""
    ax.grid(which="major", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
