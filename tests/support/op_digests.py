"""Digests of all that the ops leave, a line a call: to compare builds and instruction sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from op_inputs import LARGE, bits, tensors_of
from op_table import ROWS, Row

SIZES = [5, 9001, 0, (), (3, 11)]


def digest(row: Row, form: str, sizes: list, k: int, dtypes: tuple, **options) -> str:
    arguments = row.arguments(row.inputs(sizes, k, *dtypes, **options), form)
    whole, result = hashlib.sha256(), row.call(arguments)
    for tensor in tensors_of([result, arguments]):
        whole.update(bits(tensor).numpy().tobytes())
    return f"{row.name}, {form}, k = {k}, {dtypes[1]}: {whole.hexdigest()[:16]}"


def lines() -> Iterator[str]:
    for row in ROWS:
        for dtypes in row.dtypes:
            for form in row.forms:
                for k in {1, 14} & set(row.counts):
                    yield digest(row, form, SIZES, k, dtypes, shift=k % 2)
            if not row.scalars:  # several blocks, and runs of them
                last = list(row.forms)[-1]
                yield digest(row, last, [70001, 7], max(1, row.counts[0]), dtypes, gap=16)
    for row in ROWS:  # around the cache
        if row.segments and not row.scalars:
            yield digest(row, list(row.forms)[0], [LARGE], 1, row.dtypes[0], gap=16)


def few_lines() -> Iterator[str]:
    """Several blocks and k rows of every op, in float32 alone, where that is not its scalars."""
    for row in ROWS:
        for form in (list(row.forms)[0], list(row.forms)[-1]):
            for sizes, k in ([[], 5],) if row.scalars else ([[40001, 7], 1], [[9001], 5]):
                yield digest(row, form, sizes, min(k, row.counts[-1]), row.dtypes[0])


if __name__ == "__main__":
    for line in lines():
        print(line)
