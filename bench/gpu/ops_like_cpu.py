"""One group of ops held against the CPU backend: a line an op, whatever the others do.

    python -m gpu.ops_like_cpu GROUP [--rehearse]       # groups: gpu.stages.OP_GROUPS

Elements are the CPU's to the bit; sums, and what is worked out from them, to their last digits.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpu.lines import Lines
from gpu.processes import ROOT
from gpu.stages import OP_GROUPS
from lyapcuda import ops

sys.path.insert(0, str(ROOT / "tests" / "support"))
import simt_library  # noqa: E402
from op_calls import small_calls  # noqa: E402
from ops_cases import assert_same_bits  # noqa: E402

#: Numbers of elements: about a vector, several blocks, more tensors than a launch takes.
SIZES = ([5, 33], [70001, 33, 4097], [k % 41 for k in range(simt_library.SEGMENTS + 6)])
#: Fields of the state that make an op do its work.
FIELDS = {
    "panel_recenter_": {"pending": 1.0},
    "panel_slopes_": {"pending": 1.0, "accepted": 1.0, "h_ema": 2.0, "residual": 0.5},
    "panel_descend_": {"pending": 1.0, "accepted": 1.0, "h_ema": 2.0, "residual": 0.5},
    "reseed_": {"reseed": 1.0, "steps": 5.0, "skipped": 2.0},
}
#: Relative to the largest number of the tensor: sums of doubles in another order.
SUMS = 1e-12


def calls_of(name: str, sizes: list[int]) -> dict[str, Any]:
    """The arguments of an op, the same ones each time."""
    arguments = small_calls("cpu", sizes)[name]
    for field, value in FIELDS.get(name, {}).items():
        ops.panel_field(arguments["state"], 2, field).fill_(value)
    return arguments


def check(name: str, library: str, sizes: list[int]) -> None:
    """Raises AssertionError where the library leaves something else than the CPU does."""
    here, there = calls_of(name, sizes), calls_of(name, sizes)
    with simt_library.use(library):
        found = getattr(ops.library.namespace, name)(**here)
    expected = getattr(torch.ops.lyapcuda, name)(**there)
    if expected is not None:
        assert_close(found, expected, "what it returns")
    for argument, value in there.items():
        for actual, wanted in zip(tensors(here[argument]), tensors(value), strict=True):
            if argument == "state":
                assert_close(actual, wanted, argument)
            else:
                try:
                    assert_same_bits(actual, wanted)
                except AssertionError as error:
                    raise AssertionError(f"{argument}: {error}") from None


def tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, Tensor)]


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """To the last digits, and finite where that is."""
    finite = expected.isfinite()
    same = torch.equal(actual.isfinite(), finite)
    largest = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    error = (actual - expected)[finite].abs().max() if same and bool(finite.any()) else 0.0
    assert same and float(error) <= SUMS * largest, f"{what}: {actual} instead of {expected}"


def one(name: str, library: str) -> Mapping[str, Any]:
    """The line of an op."""
    start, fault, cases = time.monotonic(), "", 0
    try:
        for sizes in SIZES:
            check(name, library, sizes)
            cases += 1
    except (AssertionError, RuntimeError):  # a lost device is a RuntimeError, too
        fault = f"at sizes {sizes}:\n{traceback.format_exc(limit=-3)}"
    took = round(time.monotonic() - start, 2)
    return {"op": name, "right": not fault, "fault": fault, "cases": cases, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("group", choices=OP_GROUPS)
    parser.add_argument("--rehearse", action="store_true", help="on the emulator")
    options = parser.parse_args()
    lines, right = Lines.of_environment(), True
    for name in OP_GROUPS[options.group]:
        line = one(name, "simt copied" if options.rehearse else "cuda")
        lines.write("op", **line)
        print(f"{name}: {line['fault'] or 'right'}", flush=True)
        right = right and line["right"]
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
