"""recenter_ against its fp64 oracle; what it stores in 16 bits against torch's own casts."""

import itertools

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
    bits,
    eps,
    make_case,
    state_with,
    surroundings,
    threads,
)


def momenta(case, heavy):
    """The op's p and p_previous."""
    return {"p": case.d, "p_previous": case.p_next} if heavy else {}


def run(case, theta1=None, heavy=False, **state):
    """Runs the op on a case; p plays q_previous, d and p_next the momentum's two."""
    state = state_with(case.state, **state)
    theta1 = case.theta1 if theta1 is None else theta1
    beside = momenta(case, heavy)
    ops.recenter_(theta1, case.q, case.p, case.theta, case.offsets, state, **beside)
    return theta1


def oracle(case, heavy=False, **state):
    state = state_with(case.state, **state)
    beside = momenta(case, heavy)
    return reference.recenter_(case.q, case.p, case.theta, case.offsets, state, **beside)


def check(case, exact, heavy=False, **state):
    expected_theta1, expected_q, expected_p = oracle(case, heavy, **state)
    written = [case.q, case.d, *case.theta1]
    around = [surroundings(t) for t in written]
    untouched = [case.p, case.p_next, *case.theta, case.state, *([] if heavy else [case.d])]
    before = [t.clone() for t in untouched]
    theta1 = run(case, heavy=heavy, **state)
    assert_same_bits(case.q, expected_q)
    if heavy:
        assert_same_bits(case.d, expected_p)
    assert (case.q[case.gaps()] == GUARD).all()
    scale = abs(float(state_with(case.state, **state)[ops.STATE_FIELDS.index("scale")]))
    parts = zip(theta1, expected_theta1, case.theta, case.offsets, strict=True)
    for actual, expected, theta, offset in parts:
        assert actual.shape == expected.shape
        if exact:
            assert_same_bits(actual, expected.to(actual.dtype))
            continue
        # Three roundings in the buffer's dtype, half an epsilon each, and one to the storage's.
        q = case.q[offset : offset + theta.numel()].double().abs().view(theta.shape)
        size = theta.double().abs() + scale * q
        unit = 1.5 * eps(case.q.dtype) + 0.5 * eps(actual.dtype)
        error = (actual.double() - expected).abs()
        assert (error <= unit * size + torch.finfo(actual.dtype).smallest_normal * unit).all()
    assert all(map(torch.equal, map(surroundings, written), around))
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("committed", [0.0, 1.0])
@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_exactly(buffer, storage, size, committed):
    for heavy in (False, True):
        case = make_case([size], buffer, storage, exact=True, shift=size % 3)
        check(case, exact=True, heavy=heavy, committed=committed)


@pytest.mark.parametrize("committed", [0.0, 1.0])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_exactly(buffer, storage, committed):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for shift, gap, heavy in itertools.product((0, 1, 3), (0, 1, 5), (False, True)):
        case = make_case(sizes, buffer, storage, exact=True, shift=shift, gap=gap)
        check(case, exact=True, heavy=heavy, committed=committed)


@pytest.mark.parametrize("committed", [0.0, 1.0])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_outputs_beyond_the_cache_exactly(buffer, storage, shift, committed):
    case = make_case([LARGE - 16384, 16384], buffer, storage, exact=True, gap=16, shift=shift)
    check(case, exact=True, heavy=shift == 0, committed=committed)


@pytest.mark.parametrize("scale", [0.0371, -0.0371, 1e-30, 0.0])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_random_values_to_the_last_rounding(buffer, storage, scale):
    for committed in (0.0, 1.0):
        check(
            make_case([31, 100003, (5, 7)], buffer, storage, shift=1),
            exact=False,
            scale=scale,
            committed=committed,
        )


@given(
    sizes=st.lists(st.integers(0, 70), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    scale=st.floats(-1e3, 1e3),
    committed=st.booleans(),
    heavy=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_anything_to_the_last_rounding(sizes, gap, shift, dtypes, scale, committed, heavy, seed):
    case = make_case(sizes, *dtypes, gap=gap, shift=shift, seed=seed)
    check(case, exact=False, heavy=heavy, scale=scale, committed=float(committed))


@pytest.mark.parametrize("committed", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [[7, 16385, (), 3], [LARGE]])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_theta1_may_lie_where_q_previous_lies(dtype, sizes, committed):
    for shift, heavy in itertools.product((0, 1), (False, True)):
        case = make_case(sizes, dtype, dtype, gap=16, shift=shift)
        views = [
            case.p[o : o + t.numel()].view(t.shape)
            for o, t in zip(case.offsets, case.theta, strict=True)
        ]
        twin = case.clone()
        expected = run(twin, heavy=heavy, committed=committed)
        actual = run(case, theta1=views, heavy=heavy, committed=committed)
        assert_same_bits(case.q, twin.q)
        assert_same_bits(case.d, twin.d)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)
        assert (case.p[case.gaps()] == GUARD).all()


def cast(values, storage):
    """`values` as the op stores them: θ = −0 and scale 1 leave every value as it is."""
    theta = torch.full(values.shape, -0.0, dtype=storage)
    theta1 = torch.empty_like(theta)
    state = ops.new_state("cpu", scale=1.0)
    ops.recenter_([theta1], values, torch.empty_like(values), [theta], [0], state)
    return theta1


LOW_HALVES = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x5000, 0x7000, 0x7FFF]
LOW_HALVES += [0x8000, 0x8001, 0x9000, 0xB000, 0xF000, 0xFFFF]


@pytest.mark.parametrize("storage", [BF16, F16])
def test_stores_round_as_torch_casts(storage):
    # Every upper half of a float with the lower halves around both types' ties, and at random:
    # all exponents, subnormals, ties to even, overflow, ±0, ±inf and NaN.
    high = torch.arange(65536, dtype=torch.int64) << 16
    generator = torch.Generator().manual_seed(0)
    lows = [torch.full_like(high, low) for low in LOW_HALVES]
    lows += [torch.randint(0, 65536, high.shape, generator=generator) for _ in range(4)]
    for low in lows:
        values = (high + low).to(torch.int32).view(F32)
        actual, expected = cast(values, storage), values.to(storage)
        nan = values.isnan()
        assert torch.equal(actual.isnan(), nan)  # a NaN's payload is nobody's business
        assert_same_bits(actual[~nan], expected[~nan])


@pytest.mark.parametrize("storage", [BF16, F16])
def test_every_16_bit_pattern_is_read_and_stored_unchanged(storage):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(storage)
    q, theta1 = torch.full((65536,), -0.0), torch.empty_like(patterns)
    state = ops.new_state("cpu", scale=1.0)
    ops.recenter_([theta1], q, torch.empty_like(q), [patterns], [0], state)
    nan = patterns.isnan()
    assert torch.equal(theta1.isnan(), nan)
    assert_same_bits(theta1[~nan], patterns[~nan])


def test_the_largest_half_and_the_first_value_beyond():
    values = torch.tensor([65504.0, 65519.996, 65520.0, -65520.0, 1e38, 2.0**-25, 2.0**-25 * 1.001])
    expected = [65504.0, 65504.0, float("inf"), -float("inf"), float("inf"), 0.0, 2.0**-24]
    assert_same_bits(cast(values, F16), torch.tensor(expected, dtype=F16))


def test_a_scale_that_is_not_finite_does_not_reach_q():
    case = make_case([100])
    before = case.q.clone()
    (theta1,) = run(case, scale=float("inf"), committed=1.0)
    assert_same_bits(case.q, before)
    assert not theta1.isfinite().any()


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_case([70001, LARGE], F32, F16)
        with threads(count):
            run(case, heavy=True, committed=0.0)
        results.append([case.q, case.d, *case.theta1])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(bits(a), bits(b))


def test_no_segments_do_nothing():
    case = make_case([])
    run(case)
    assert (case.q == GUARD).all()


WRONG = {
    "q dtype": ({"q": torch.zeros(40, dtype=BF16)}, "q: expected float32 or float64"),
    "q dim": ({"q": torch.zeros(4, 10)}, "q: expected a contiguous 1-D"),
    "q_previous size": ({"q_previous": torch.zeros(41)}, "q_previous: 41 elements"),
    "q_previous dtype": ({"q_previous": torch.zeros(40, dtype=F64)}, "q_previous: dtype"),
    "q_previous strided": ({"q_previous": torch.zeros(80)[::2]}, "q_previous: expected"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors"),
    "theta dtype": (
        {"theta": [torch.zeros(10, dtype=F64), torch.zeros(12, dtype=F64)]},
        r"theta\[0\]: dtype",
    ),
    "theta mixed": ({"theta": [torch.zeros(10), torch.zeros(12, dtype=F16)]}, r"theta\[1\]: dtype"),
    "theta strided": ({"theta": [torch.zeros(10), torch.zeros(24)[::2]]}, r"theta\[1\]: expected"),
    "theta1 count": ({"theta1": [torch.zeros(10)]}, "theta1: 1 tensors"),
    "theta1 size": ({"theta1": [torch.zeros(10), torch.zeros(11)]}, r"theta1\[1\]: 11"),
    "theta1 dtype": (
        {"theta1": [torch.zeros(10, dtype=F16), torch.zeros(12, dtype=F16)]},
        r"theta1\[0\]: dtype",
    ),
    "theta1 strided": (
        {"theta1": [torch.zeros(10), torch.zeros(24)[::2]]},
        r"theta1\[1\]: expected",
    ),
    "offsets count": ({"offsets": [0]}, "offsets has 1"),
    "offset negative": ({"offsets": [-3, 20]}, r"offsets\[0\]: -3"),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "p alone": ({"p": torch.zeros(40)}, "p, p_previous: give both or neither"),
    "p_previous alone": ({"p_previous": torch.zeros(40)}, "p, p_previous: give both or neither"),
    "p size": ({"p": torch.zeros(39), "p_previous": torch.zeros(40)}, "p: 39 elements"),
    "p_previous dtype": (
        {"p": torch.zeros(40), "p_previous": torch.zeros(40, dtype=F64)},
        "p_previous: dtype",
    ),
    "p_previous strided": (
        {"p": torch.zeros(40), "p_previous": torch.zeros(80)[::2]},
        "p_previous: expected",
    ),
    "state size": ({"state": torch.zeros(15, dtype=F64)}, "state: expected"),
    "state dtype": ({"state": torch.zeros(14)}, "state: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "theta1": [torch.zeros(10), torch.zeros(12)],
        "q": torch.ones(40),
        "q_previous": torch.ones(40) * 2,
        "theta": [torch.ones(10), torch.ones(12)],
        "offsets": [0, 20],
        "state": ops.new_state("cpu", scale=1.0, committed=0.0),
    }
    arguments |= replaced
    written = [arguments["q"], *arguments["theta1"]]
    written += [arguments["p"]] if "p" in arguments else []
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        ops.recenter_(**arguments)
    for now, then in zip(written, before, strict=True):
        assert_same_bits(now, then)
