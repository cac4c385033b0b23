"""panel_recenter_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GUARD,
    assert_same_bits,
    eps,
    surroundings,
    threads,
)
from panel_cases import (
    COUNTS,
    LARGE,
    TAILS,
    combined_bits,
    make_panel_case,
    zero_panel,
)


def run(case, copies=None):
    copies = case.copies if copies is None else copies
    ops.panel_recenter_(case.q, copies, case.d, case.theta, case.offsets, case.state)


def expected_bits(case):
    used = case.used()
    q = case.q
    if float(ops.panel_field(case.state, case.k, "pending")):
        d = torch.where(used, case.d, torch.zeros((), dtype=case.d.dtype))
        q = combined_bits(d, ops.panel_field(case.state, case.k, "transform"))
    return q[:, used], (case.flat(case.theta) + q)[:, used].to(case.copies.dtype)


def check(case):
    q, copies = expected_bits(case)
    oracle_q, oracle_copies = panel_reference.panel_recenter_(
        case.q, case.d, case.theta, case.offsets, case.state
    )
    written = [case.q, case.copies]
    around = [surroundings(t.view(-1)) for t in written]
    untouched = [t for t in case.tensors() if not any(t is w for w in written)]
    before = [t.clone() for t in untouched]
    run(case)
    used = case.used()
    for actual, expected in ((case.q, q), (case.copies, copies)):
        assert_same_bits(actual[:, used], expected)
        assert (actual[:, ~used] == GUARD).all()
    # k products and sums in T, half an epsilon each, and one rounding to the storage's type.
    transform = ops.panel_field(case.state, case.k, "transform")
    size = case.q.double().abs() + transform.abs().T @ case.d.double().abs()
    unit = (case.k + 2) * eps(case.q.dtype)
    assert ((case.q.double() - oracle_q).abs() <= unit * size)[:, used].all()
    whole = size + case.flat(case.theta).double().abs()
    error = (case.copies.double() - oracle_copies).abs()
    tiny = torch.finfo(case.copies.dtype).smallest_normal
    assert (error <= (unit + eps(case.copies.dtype)) * (whole + tiny))[:, used].all()
    assert all(map(torch.equal, [surroundings(t.view(-1)) for t in written], around))
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_to_the_bit(buffer, storage, k, size):
    for pending in (0.0, 1.0):
        check(make_panel_case(k, [size], buffer, storage, shift=size % 3, pending=pending))


@pytest.mark.parametrize("pending", [0.0, 1.0])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_to_the_bit(buffer, storage, pending):
    sizes = [9, 0, (), (3, 0, 2), 4097, (33, 7), 1]
    for k, shift, gap in itertools.product((1, 3, 6), (0, 1, 3), (0, 1, 5)):
        check(make_panel_case(k, sizes, buffer, storage, shift=shift, gap=gap, pending=pending))


@given(
    k=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 300), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    pending=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(k, sizes, gap, shift, dtypes, pending, seed):
    check(
        make_panel_case(k, sizes, *dtypes, gap=gap, shift=shift, seed=seed, pending=float(pending))
    )


@pytest.mark.parametrize("pending", [0.0, 1.0])
@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_copies_may_lie_where_d_lies(dtype, k, pending):
    for shift in (0, 1):
        sizes = [7, 4097, (), 33]
        case = make_panel_case(k, sizes, dtype, dtype, shift=shift, pending=pending)
        twin = make_panel_case(k, sizes, dtype, dtype, shift=shift, pending=pending)
        run(twin)
        run(case, copies=case.d)
        assert_same_bits(case.q, twin.q)
        used = case.used()
        assert_same_bits(case.d[:, used], twin.copies[:, used])
        assert (case.d[:, ~used] == GUARD).all()


def test_the_transform_of_benettin_makes_an_orthonormal_panel():
    case = make_panel_case(5, [4097], F64, F64, gap=0)
    generator = torch.Generator().manual_seed(1)
    curvature = torch.rand(4097, generator=generator, dtype=F64) * 4 - 1
    case.g0[0].zero_()
    case.g1.copy_(case.q * curvature)
    sums = ops.panel_ascent_(case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    ops.benettin_(case.state, sums, torch.zeros(2, dtype=F64), 5)
    run(case)
    expected = 0.25 * torch.eye(5, dtype=F64)  # Δq = 0.5
    torch.testing.assert_close(ops.gram(case.q, case.q), expected, rtol=0, atol=1e-13)


def test_a_transform_that_is_not_finite_does_not_reach_q_unless_pending():
    case = make_panel_case(3, [100], pending=0.0, transform=math.inf)
    before = case.q.clone()
    run(case)
    assert_same_bits(case.q, before)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_panel_case(4, [LARGE, 70001], F32, BF16, pending=1.0)
        with threads(count):
            run(case)
        results.append((case.q, case.copies))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


def test_no_segments_do_nothing():
    case = make_panel_case(3, [], pending=1.0)
    run(case)
    assert (case.q == GUARD).all() and (case.copies == GUARD).all()


def test_the_version_of_what_is_written_counts():
    case = make_panel_case(2, [5, 3])
    before = case.q._version, case.copies._version, case.d._version
    run(case)
    assert case.q._version > before[0] and case.copies._version > before[1]
    assert case.d._version == before[2]


WHOLE = zero_panel(7)
WRONG = {
    "q dtype": ({"q": zero_panel(dtype=BF16)}, "q: expected float32 or float64"),
    "q dim": ({"q": torch.zeros(40)}, "q: expected a contiguous 2-D"),
    "q rows": ({"q": zero_panel(33)}, "q: 33 rows, expected 1 to 32"),
    "d dtype": ({"d": zero_panel(dtype=F64)}, "d: dtype"),
    "d rows": ({"d": zero_panel(2)}, "d: 2 rows, but q has 3"),
    "d strided": ({"d": zero_panel(40, 3).T}, "d: expected a contiguous 2-D"),
    "copies dtype": (
        {"copies": zero_panel(dtype=F16)},
        "copies: dtype Half differs from theta's Float",
    ),
    "copies rows": ({"copies": zero_panel(4)}, "copies: 4 rows of 40, but q has 3 of 40"),
    "copies strided": ({"copies": zero_panel(40, 3).T}, "copies: expected a contiguous 2-D"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors, but offsets has 2"),
    "theta dtype": ({"theta": [torch.zeros(10, dtype=F64)] * 2}, r"theta\[0\]: dtype"),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "state size": ({"state": ops.new_panel_state("cpu", 4)}, "state: expected 50 elements"),
    "q is d": ({"q": WHOLE[:3], "d": WHOLE[:3]}, "q: shares memory with d"),
    "q in d": ({"q": WHOLE[:3], "d": WHOLE[2:5]}, "q: shares memory with d"),
    "q is copies": ({"q": WHOLE[:3], "copies": WHOLE[:3]}, "q: shares memory with copies"),
    "copies in d": ({"copies": WHOLE[:3], "d": WHOLE[1:4]}, "copies: shares memory with d"),
    "copies of another dtype in d": (
        {
            "copies": WHOLE[:3].view(-1).view(BF16)[: 3 * 40].view(3, 40),
            "d": WHOLE[:3],
            "theta": [torch.ones(n, dtype=BF16) for n in (10, 12)],
        },
        "copies: shares memory with d, but is not the same elements",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "q": torch.full((3, 40), GUARD),
        "copies": torch.full((3, 40), GUARD),
        "d": torch.ones(3, 40),
        "theta": [torch.ones(10), torch.ones(12)],
        "offsets": [0, 20],
        "state": ops.new_panel_state("cpu", 3, pending=1.0),
    }
    ops.panel_recenter_(**{**arguments, "q": zero_panel(), "copies": zero_panel()})
    arguments |= replaced
    written = [arguments["q"], arguments["copies"]]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        ops.panel_recenter_(**arguments)
    for now, then in zip(written, before, strict=True):
        assert_same_bits(now, then)
