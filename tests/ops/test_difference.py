"""difference_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from lyapcuda.ops import reference
from ops_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GUARD,
    LARGE,
    TAILS,
    assert_same_bits,
    eps,
    make_case,
    number,
    surroundings,
    threads,
)

KINDS = list(itertools.product((0.0, 0.0371), (0.0, -1.25)))  # weight_decay, keep


def difference_bits(out, plus, minus, v, scale, keep, weight_decay):
    def rounded(value):
        return torch.tensor(value, dtype=out.dtype)

    value = (plus.flatten().to(out.dtype) - minus.flatten().to(out.dtype)) * rounded(scale)
    if weight_decay:
        value = value + v * rounded(weight_decay)
    return value + out * rounded(keep) if keep else value


def check(case, scale, keep, weight_decay):
    """d plays out, q plays v, g1 and g0 are the gradients."""
    expected = case.d.clone()
    for offset, g0, g1 in zip(case.offsets, case.g0, case.g1, strict=True):
        span = slice(offset, offset + g0.numel())
        expected[span] = difference_bits(
            case.d[span], g1, g0, case.q[span], scale, keep, weight_decay
        )
    options = {"keep": keep, "weight_decay": weight_decay, "v": case.q if weight_decay else None}
    arguments = (case.g1, case.g0, case.offsets, number(scale))
    oracle = reference.difference_(case.d, *arguments, **options)
    around, old = surroundings(case.d), case.d.double()
    untouched = [case.q, *case.g0, *case.g1]
    before = [t.clone() for t in untouched]
    ops.difference_(case.d, *arguments, **options)
    assert_same_bits(case.d, expected)
    assert (case.d[case.gaps()] == GUARD).all()
    assert torch.equal(surroundings(case.d), around)
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)
    for offset, g0, g1 in zip(case.offsets, case.g0, case.g1, strict=True):
        span = slice(offset, offset + g0.numel())
        size = abs(scale) * (g0.double().abs() + g1.double().abs()).flatten()
        size = size + abs(weight_decay) * case.q[span].double().abs() + abs(keep) * old[span].abs()
        unit = 4 * eps(case.d.dtype)
        tiny = torch.finfo(case.d.dtype).smallest_normal
        assert ((case.d[span].double() - oracle[span]).abs() <= unit * (size + tiny)).all()


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_to_the_bit(buffer, storage, size):
    for weight_decay, keep in KINDS:
        case = make_case([size], buffer, storage, shift=size % 3)
        check(case, 0.7, keep, weight_decay)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_to_the_bit(buffer, storage):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for (shift, gap), (weight_decay, keep) in itertools.product([(0, 0), (1, 1), (3, 5)], KINDS):
        check(make_case(sizes, buffer, storage, shift=shift, gap=gap), -3.3, keep, weight_decay)


@given(
    sizes=st.lists(st.integers(0, 70), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    scale=st.floats(-1e6, 1e6),
    keep=st.floats(-2.0, 2.0),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(sizes, gap, shift, dtypes, scale, keep, weight_decay, seed):
    check(make_case(sizes, *dtypes, gap=gap, shift=shift, seed=seed), scale, keep, weight_decay)


def test_out_is_not_read_where_nothing_of_it_is_kept():
    case = make_case([1003])
    case.d.fill_(math.nan)
    ops.difference_(case.d, case.g1, case.g0, case.offsets, number(1.0))
    assert case.d[~case.gaps()].isfinite().all() and case.d[case.gaps()].isnan().all()


@pytest.mark.parametrize("which", ["g0", "g1"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_out_may_lie_where_a_gradient_does(dtype, which):
    for weight_decay, keep in KINDS:
        case = make_case([7, 16385], dtype, dtype)
        views = [
            case.d[o : o + g.numel()].copy_(g)
            for o, g in zip(case.offsets, getattr(case, which), strict=True)
        ]
        twin = case.clone()
        setattr(case, which, views)
        options = {"keep": keep, "weight_decay": weight_decay}
        for c in (twin, case):
            ops.difference_(c.d, c.g1, c.g0, c.offsets, number(0.7), v=c.q, **options)
        assert_same_bits(case.d, twin.d)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_case([70001, LARGE], F32, BF16)
        with threads(count):
            ops.difference_(case.d, case.g1, case.g0, case.offsets, number(0.7), keep=0.5)
        results.append(case.d)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_the_version_of_what_is_written_counts():
    case = make_case([5, 3])
    before = case.d._version
    ops.difference_(case.d, case.g1, case.g0, case.offsets, number(1.0))
    assert case.d._version > before


WRONG = {
    "out dtype": ({"out": torch.zeros(40, dtype=F16)}, "out: expected float32 or float64"),
    "out dim": ({"out": torch.zeros(1, 40)}, "out: expected a contiguous 1-D"),
    "plus count": ({"plus": [torch.zeros(10)]}, "plus: 1 tensors, but offsets has 2"),
    "plus dtype": ({"plus": [torch.zeros(10, dtype=F64)] * 2}, r"plus\[0\]: dtype"),
    "minus count": ({"minus": [torch.zeros(10)]}, "minus: 1 tensors"),
    "minus size": ({"minus": [torch.zeros(10), torch.zeros(11)]}, r"minus\[1\]: 11 elements"),
    "minus dtype": (
        {"minus": [torch.zeros(10, dtype=BF16), torch.zeros(12, dtype=BF16)]},
        r"minus\[0\]: dtype",
    ),
    "minus strided": (
        {"minus": [torch.zeros(10), torch.zeros(24)[::2]]},
        r"minus\[1\]: expected a contiguous",
    ),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "scale dtype": ({"scale": torch.zeros(1)}, "scale: expected a contiguous float64"),
    "scale size": ({"scale": torch.zeros(2, dtype=F64)}, "scale: expected 1 elements, got 2"),
    "v size": ({"v": torch.zeros(41)}, "v: 41 elements, but out has 40"),
    "v dtype": ({"v": torch.zeros(40, dtype=F64)}, "v: dtype"),
    "no v": ({"weight_decay": 0.5}, "weight_decay: 0.5 needs v"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "out": torch.zeros(40),
        "plus": [torch.ones(10), torch.ones(12)],
        "minus": [torch.ones(10) * 2, torch.ones(12) * 2],
        "offsets": [0, 20],
        "scale": number(0.5),
    }
    ops.difference_(**{**arguments, "out": torch.zeros(40)})
    arguments |= replaced
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.difference_(**arguments)
    assert_same_bits(arguments["out"], before)
