"""stream_copy_: every byte arrives, and none beside."""

import pytest
import torch

from lyapcuda import ops
from lyapcuda.ops import reference
from ops_cases import (
    BF16,
    F32,
    F64,
    GUARD,
    LARGE,
    TAILS,
    assert_same_bits,
    guarded,
    surroundings,
    threads,
)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [*TAILS, LARGE])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_byte_arrives_and_none_beside(dtype, size, shift):
    source = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    destination = guarded(size, dtype, shift)
    around = surroundings(destination)
    before = source.clone()
    for count in (1, 2):
        destination.fill_(GUARD)
        with threads(count):
            ops.stream_copy_(destination, source)
        assert_same_bits(destination, reference.stream_copy_(before))
    assert_same_bits(surroundings(destination), around)
    assert_same_bits(source, before)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_nan_payloads_and_subnormals_arrive_too(dtype):
    integer = torch.int32 if dtype == F32 else torch.int64
    span = torch.iinfo(integer)
    patterns = torch.randint(span.min, span.max, (10007,), dtype=integer).view(dtype)
    destination = torch.empty_like(patterns)
    ops.stream_copy_(destination, patterns)
    assert_same_bits(destination, patterns)


WRONG = {
    "source dtype": ({"source": torch.zeros(40, dtype=BF16)}, "source: expected float32"),
    "source dim": ({"source": torch.zeros(4, 10)}, "source: expected a contiguous 1-D"),
    "source strided": ({"source": torch.zeros(80)[::2]}, "source: expected a contiguous"),
    "destination dtype": ({"destination": torch.zeros(40, dtype=F64)}, "destination: dtype"),
    "destination size": ({"destination": torch.zeros(39)}, "destination: 39 elements"),
    "destination strided": ({"destination": torch.zeros(80)[::2]}, "destination: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {"destination": torch.zeros(40), "source": torch.ones(40)} | replaced
    before = arguments["destination"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.stream_copy_(**arguments)
    assert_same_bits(arguments["destination"], before)
