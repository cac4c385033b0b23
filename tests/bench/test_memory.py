"""docs/howto/large_models.md: its gigabytes follow from its formulas, these from what is held."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.memory import TYPES, of_tracker, tracker_vectors

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "large_models.md"
SIZES = {"0.1 B": 1e8, "1 B": 1e9, "7 B": 7e9, "70 B": 7e10}


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_tracker_holds_as_much_as_the_page_says(dtype, k, metric):
    said = tracker_vectors(k, dtype == "bfloat16", metric)
    assert -0.5 < of_tracker(TYPES[dtype], k, metric) - said < 1  # the largest parameter is 0.5


def gigabytes(columns: int) -> list[list[float]]:
    """The numbers of the page's table of so many columns, a row a size; [least, most] apart."""
    rows = re.findall(r"^\| ([\d.]+ B) \|(.*)\|$", PAGE.read_text("utf-8"), re.M)
    found = [(SIZES[size], cells.split("|")) for size, cells in rows]
    return [
        [n, *(float(x.replace(",", "")) for cell in cells for x in cell.split(" to "))]
        for n, cells in found
        if len(cells) == columns
    ]


def test_the_gigabytes_follow_from_the_formulas():
    tracker = [
        (1, False, False),
        (1, False, True),
        (5, False, True),
        (1, True, True),
        (5, True, True),
    ]
    vectors = [tracker_vectors(*case) for case in tracker]
    assert len(gigabytes(5)) == 4
    for n, *said in gigabytes(5):
        assert said == pytest.approx([4 * n * v / 1e9 for v in vectors], rel=0.01)
    assert len(gigabytes(2)) == 3
    for n, *said in gigabytes(2):
        ends = [k + 3 if least else 2 * k + 8 for k in (1, 5) for least in (True, False)]
        assert said == pytest.approx([4 * n * v / 1e9 for v in ends], rel=0.01)
