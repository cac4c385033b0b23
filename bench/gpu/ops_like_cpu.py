"""The ops of modules held against the CPU backend: a line an op, whatever the others do.

    python -m gpu.ops_like_cpu MODULE... [--rehearse]   # of lyapcuda.ops: gpu.stages.OP_MODULES

Calls are those of the tests' table of ops. Elements are the CPU's to the bit; sums, and what is
worked out from them, to their last digits.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.lines import Lines
from gpu.processes import ROOT
from gpu.stages import OP_MODULES
from lyapcuda import ops

sys.path.insert(0, str(ROOT / "tests" / "support"))
import simt_library  # noqa: E402
from op_inputs import F32, F64, assert_same_bits, tensors_of  # noqa: E402
from op_table import ROWS, Row  # noqa: E402

#: Numbers of elements: about a vector, several blocks, more tensors than a launch takes.
SIZES = ([5, 33], [70001, 33, 4097], [k % 41 for k in range(simt_library.SEGMENTS + 6)])
#: Relative to the largest number of the tensor: sums of doubles in another order.
SUMS = 1e-12


def ops_of(module: str) -> list[str]:
    """Those that the table has, in its order."""
    names = dict.fromkeys(row.op for row in ROWS)
    return [name for name in names if getattr(ops, name).__module__ == f"lyapcuda.ops.{module}"]


def check(row: Row, form: str, sizes: list[int], k: int, library: str) -> None:
    """Raises AssertionError where the library leaves something else than the CPU does."""
    dtypes = (F32, F32) if (F32, F32) in row.dtypes else (F64, F64)
    here, there = (row.arguments(row.inputs(sizes, k, *dtypes), form) for _ in range(2))
    expected = row.call(there)
    with simt_library.use(library):
        found = row.call(here)
    if expected is not None:
        assert_close(found, expected, "what it returns")
    for argument, value in there.items():
        pairs = zip(tensors_of(here[argument]), tensors_of(value), strict=True)
        for actual, wanted in pairs:
            if argument == "state":
                assert_close(actual, wanted, argument)
            else:
                try:
                    assert_same_bits(actual, wanted)
                except AssertionError as error:
                    raise AssertionError(f"{argument}: {error}") from None


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """To the last digits, and finite where that is."""
    finite = expected.isfinite()
    same = torch.equal(actual.isfinite(), finite)
    largest = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    error = (actual - expected)[finite].abs().max() if same and bool(finite.any()) else 0.0
    assert same and float(error) <= SUMS * largest, f"{what}: {actual} instead of {expected}"


def one(name: str, library: str, every_size: Sequence[list[int]] = SIZES) -> Mapping[str, Any]:
    """The line of an op."""
    start, fault, cases = time.monotonic(), "", 0
    where = ""
    try:
        for row in ROWS:
            for form in row.forms if row.op == name else ():
                for k in {1, 2} & set(row.counts):
                    for sizes in every_size:
                        where = f"{row.name}, {form}, k = {k}, sizes {sizes}"
                        check(row, form, sizes, k, library)
                        cases += 1
    except (AssertionError, RuntimeError):  # a lost device is a RuntimeError, too
        fault = f"{where}:\n{traceback.format_exc(limit=-3)}"
    took = round(time.monotonic() - start, 2)
    return {"op": name, "right": not fault, "fault": fault, "cases": cases, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="+", choices=OP_MODULES)
    parser.add_argument("--rehearse", action="store_true", help="on the emulator")
    options = parser.parse_args()
    lines, right = Lines.of_environment(), True
    for name in (name for module in options.module for name in ops_of(module)):
        # (Several blocks take the emulator long.)
        line = one(name, "simt copied", SIZES[:1]) if options.rehearse else one(name, "cuda")
        lines.write("op", **line)
        print(f"{name}: {line['fault'] or 'right'}", flush=True)
        right = right and line["right"]
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
