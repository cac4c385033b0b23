"""Small tables: as aligned text, and as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

__all__ = ["aligned", "html_table"]

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, sides: str = "") -> list[str]:
    """Returns a line a row, in columns that stand apart by two spaces.

    Args:
        rows: the head first; all of one length.
        sides: ">" or "<" a column: where its words stand. Missing ones stand on the left.

    Example:
        >>> print("\\n".join(aligned([("", "value"), ("0", "12.5"), ("1", "3")], ">>")))
           value
        0   12.5
        1      3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), "<")[: len(widths)]
    return [
        "  ".join(
            f"{word:{side}{width}}" for word, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def html_table(rows: Rows) -> str:
    """Returns a table whose first row is its head.

    Example:
        >>> html_table([("a", "b"), ("1", "<2")])
        '<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>&lt;2</td></tr></table>'
    """

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(word)}</{tag}>" for word in row) + "</tr>"

    head, *body = rows
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in body)}</table>"
