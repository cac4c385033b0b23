"""The ends of the spectrum that a tracker follows: a map each, with one separation or several."""

from __future__ import annotations

from typing import Any

from lyapcuda.dynamics.benettin import MAX_SEPARATIONS, Benettin
from lyapcuda.dynamics.separation import SIGNS, Separation
from lyapcuda.params.flat import FlatLayout

__all__ = ["ENDS", "ends_of", "new_separation"]

#: The ends of the spectrum that `which` asks for, each by the sign of its map.
ENDS = {"LA": ("LA",), "SA": ("SA",), "BE": ("LA", "SA")}


def ends_of(which: str, k: int, numel: int) -> list[tuple[str, int]]:
    """The ends, each with how many of the k eigenvalues of ``numel`` parameters it has.

    Raises:
        ValueError: naming k, where there are too many or too few.
    """
    if k > numel:
        raise ValueError(f"k={k}: there are only {numel} parameters")
    if which == "BE" and k < 2:
        raise ValueError(f'k={k}: which="BE" needs at least 2, one eigenvalue from either end')
    ks = [k] if which != "BE" else [(k + 1) // 2, k // 2]
    if max(ks) > MAX_SEPARATIONS:
        raise ValueError(f"k={k}: at most {MAX_SEPARATIONS} from either end of the spectrum")
    return list(zip(ENDS[which], ks, strict=True))


def new_separation(layout: FlatLayout, end: str, k: int, **options: Any) -> Separation | Benettin:
    """What carries the k separations of one end from step to step."""
    if k == 1:
        return Separation(layout, sign=SIGNS[end], **options)
    return Benettin(layout, k, sign=SIGNS[end], **options)
