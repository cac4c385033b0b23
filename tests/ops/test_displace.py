"""displace_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

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
    make_case,
    number,
    surroundings,
    threads,
)


def displaced_bits(q, theta, offset, step):
    """(copies, displacement) of one segment as the op's arithmetic has them."""
    here = theta.flatten().to(q.dtype)
    v = q[offset : offset + theta.numel()]
    copies = (here + v * torch.tensor(step, dtype=q.dtype)).to(theta.dtype)
    return copies, copies.to(q.dtype) - here


def check(case, step):
    """theta1 plays the copies, q the direction."""
    around = [surroundings(t) for t in case.theta1]
    untouched = [case.q, *case.theta]
    before = [t.clone() for t in untouched]
    sums = ops.displace_(case.theta1, case.q, case.theta, case.offsets, number(step))
    _, expected = reference.displace_(case.q, case.theta, case.offsets, number(step))
    size = torch.zeros(2, dtype=F64)
    for copy, theta, offset in zip(case.theta1, case.theta, case.offsets, strict=True):
        bits, moved = displaced_bits(case.q, theta, offset, step)
        assert_same_bits(copy.flatten(), bits)
        v = case.q[offset : offset + theta.numel()].double()
        size += torch.stack([(v * moved.double()).abs().sum(), (v * v).sum()])
    assert sums.shape == (2,) and sums.dtype == F64
    assert ((sums - expected).abs() <= 1e-12 * size).all() or not math.isfinite(step)
    assert all(map(torch.equal, map(surroundings, case.theta1), around))
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)
    return sums


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_to_the_bit(buffer, storage, size):
    for shift, step in ((size % 3, 0.0371), (0, -1e-3)):
        check(make_case([size], buffer, storage, shift=shift), step)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_to_the_bit(buffer, storage):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for shift, gap in itertools.product((0, 1, 3), (0, 1, 5)):
        check(make_case(sizes, buffer, storage, shift=shift, gap=gap), 0.25)


@given(
    sizes=st.lists(st.integers(0, 70), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    step=st.floats(-1e3, 1e3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(sizes, gap, shift, dtypes, step, seed):
    check(make_case(sizes, *dtypes, gap=gap, shift=shift, seed=seed), step)


def test_what_was_realised_is_the_step_but_for_rounding():
    for buffer, storage in DTYPES:
        case = make_case([4097, 33], buffer, storage)
        realised, square = check(case, 0.1).tolist()
        assert math.isclose(realised / square / 0.1, 1.0, rel_tol=2 * torch.finfo(storage).eps)


def test_a_step_below_the_parameters_precision_realises_nothing():
    case = make_case([100], F32, BF16)
    case.theta[0].fill_(1.0)
    assert check(case, 1e-6)[0] == 0.0


@pytest.mark.parametrize("step", [math.inf, math.nan])
def test_a_step_that_is_not_finite_shows_in_the_sums(step):
    case = make_case([33])
    assert not ops.displace_(
        case.theta1, case.q, case.theta, case.offsets, number(step)
    ).isfinite()[0]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_copies_may_lie_where_v_lies(dtype):
    case = make_case([7, 16385], dtype, dtype)
    twin = case.clone()
    expected = ops.displace_(twin.theta1, twin.q, twin.theta, twin.offsets, number(0.3))
    views = [case.q[o : o + t.numel()] for o, t in zip(case.offsets, case.theta, strict=True)]
    assert_same_bits(ops.displace_(views, case.q, case.theta, case.offsets, number(0.3)), expected)
    for a, b in zip(views, twin.theta1, strict=True):
        assert_same_bits(a, b)
    assert (case.q[case.gaps()] == GUARD).all()


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_case([70001, LARGE], F32, F16)
        with threads(count):
            sums = ops.displace_(case.theta1, case.q, case.theta, case.offsets, number(0.3))
        results.append([sums, *case.theta1])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


def test_no_segments_give_zero_sums():
    case = make_case([])
    assert torch.equal(ops.displace_([], case.q, [], [], number(1.0)), torch.zeros(2, dtype=F64))


def test_the_version_of_what_is_written_counts():
    case = make_case([5, 3])
    before = [t._version for t in case.theta1]
    ops.displace_(case.theta1, case.q, case.theta, case.offsets, number(1.0))
    assert all(t._version > v for t, v in zip(case.theta1, before, strict=True))


WRONG = {
    "v dtype": ({"v": torch.zeros(40, dtype=F16)}, "v: expected float32 or float64"),
    "v dim": ({"v": torch.zeros(1, 40)}, "v: expected a contiguous 1-D"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors, but offsets has 2"),
    "theta dtype": ({"theta": [torch.zeros(10, dtype=F64)] * 2}, r"theta\[0\]: dtype"),
    "copies count": ({"copies": [torch.zeros(10)]}, "copies: 1 tensors"),
    "copies size": ({"copies": [torch.zeros(10), torch.zeros(11)]}, r"copies\[1\]: 11 elements"),
    "copies dtype": (
        {"copies": [torch.zeros(10, dtype=F16), torch.zeros(12, dtype=F16)]},
        r"copies\[0\]: dtype",
    ),
    "copies strided": (
        {"copies": [torch.zeros(10), torch.zeros(24)[::2]]},
        r"copies\[1\]: expected a contiguous",
    ),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "step dtype": ({"step": torch.zeros(1)}, "step: expected a contiguous float64"),
    "step size": ({"step": torch.zeros(2, dtype=F64)}, "step: expected 1 elements, got 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "copies": [torch.zeros(10), torch.zeros(12)],
        "v": torch.ones(40),
        "theta": [torch.ones(10), torch.ones(12)],
        "offsets": [0, 20],
        "step": number(0.5),
    }
    ops.displace_(**{**arguments, "copies": [torch.zeros(10), torch.zeros(12)]})
    arguments |= replaced
    before = [t.clone() for t in arguments["copies"]]
    with pytest.raises(RuntimeError, match=message):
        ops.displace_(**arguments)
    for now, then in zip(arguments["copies"], before, strict=True):
        assert_same_bits(now, then)
