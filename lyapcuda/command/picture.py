"""Empty figures and colours, for pictures; matplotlib is imported where it is first needed."""

from __future__ import annotations

from typing import Any

# Okabe-Ito, but for a darker red: they stay apart for every reader.
BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#C8102E", "#009E73"
PURPLE = "#8F3F97"


def require_matplotlib() -> None:
    """Import matplotlib or say how to get it.

    Raises:
        ImportError: it is missing, naming the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lyapcuda[examples]'") from error


def new_figure(width: float = 7.6, height: float = 4.6, dpi: int = 150) -> Any:
    """An empty figure, in inches.

    Raises:
        ImportError: without matplotlib.
    """
    require_matplotlib()
    # Figure, not pyplot: no window system, no state shared with the caller's own plots.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi)
