"""Every op in every form, once, on a few small tensors: what compute-sanitizer looks at.

    compute-sanitizer --tool racecheck python -m gpu.every_op PART...   # parts: gpu.stages.PARTS

Calls are those of the tests' table of ops. Sizes around those of blocks and vectors, aligned and
not; more tensors than one launch takes. A line says how many calls of a kind were made, so that a
run that is cut off tells how far it came.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.lines import Lines
from gpu.processes import ROOT

sys.path.insert(0, str(ROOT / "tests" / "support"))
from op_inputs import DTYPES  # noqa: E402
from op_table import ROWS, Row  # noqa: E402
from simt_library import SEGMENTS  # noqa: E402

#: Blocks take several tiles of these, the next one on its way meanwhile.
LONG = [700003, 33]
#: A few; more than a launch takes, and those within it that end a block.
LISTS = ([1, 0, 33, 4097, (3, 5)], [k % 41 for k in range(SEGMENTS + 6)], [100003])
SOME = [1, 0, 33, 1030, (3, 5), *(k % 13 for k in range(SEGMENTS + 2))]
#: Sizes and numbers of vectors of each part, and the sizes that only a GPU is given.
SHAPES: dict[str, tuple[Sequence[Any], Sequence[int], Sequence[int]]] = {
    "one vector": (LISTS, (1,), ()),
    "k vectors": ([SOME], (3, 14, 32, 2, 5), (5, 14)),
    "Krylov vectors": ([[1031]], (128, 33, 1), (5, 14, 33)),
}
#: Calls, and of what.
Counted = Iterator[tuple[int, str]]


def on(device: str, value: Any, shift: int) -> Any:
    """The argument there; every tensor an allocation of its own, ``shift`` elements off alignment
    where that may be."""
    if isinstance(value, list):
        return [on(device, item, shift) for item in value]
    if not isinstance(value, Tensor):
        return value
    out = torch.empty(value.numel() + shift, dtype=value.dtype, device=device)[shift:]
    return out.copy_(value.flatten()).view(value.shape)


def rows_of(part: str) -> list[Row]:
    """Those whose arguments have segments, and those of the Krylov vectors."""
    return [row for row in ROWS if (part == "Krylov vectors") != row.segments]


def calls(
    part: str, device: str, dtypes: Sequence[Any], shifts: Sequence[int], few: bool
) -> Counted:
    lists, counts, longer = SHAPES[part]
    cases = list(itertools.product(dtypes, lists, counts, shifts))
    if device == "cuda":
        cases[:0] = itertools.product(dtypes[:2], [LONG], longer, (0,))
    for pair, sizes, k, shift in cases:
        count = 0
        for row in rows_of(part):
            if k not in row.counts or pair not in row.dtypes:
                continue
            for form in row.forms:
                arguments = row.arguments(row.inputs(sizes, k, *pair, gap=16), form)
                row.call({name: on(device, value, shift) for name, value in arguments.items()})
                count += 1
        yield count, f"{pair[0]} beside {pair[1]}, k = {k}, {len(sizes)} tensors, shift {shift}"
        if few and count:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="+", choices=SHAPES)
    parser.add_argument("--rehearse", action="store_true", help="a few, on the CPU")
    options = parser.parse_args()
    device, given = "cuda", (DTYPES, (0, 1))
    if options.rehearse:
        device, given = "cpu", (DTYPES[:1], (1,))
    lines = Lines.of_environment()
    for part in options.part:
        for count, what in calls(part, device, *given, few=options.rehearse):
            if device == "cuda":
                torch.cuda.synchronize()
            lines.write("calls", count=count, what=what)
            print(f"{count} calls: {what}", flush=True)


if __name__ == "__main__":
    main()
