"""ascent_ against its fp64 oracle, to the last bit where the arithmetic allows it."""

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
    KINDS,
    LARGE,
    SUM,
    TAILS,
    ascent_options,
    assert_same_bits,
    eps,
    guarded,
    make_case,
    surroundings,
    threads,
)


def step(case, sign=1, d=None, **options):
    """Runs the op on a case; returns what it wrote."""
    d = case.d if d is None else d
    sums = ops.ascent_(d, case.q, case.g0, case.g1, case.offsets, case.state, sign=sign, **options)
    return d, options.get("p_next"), sums


def oracle(case, sign=1, **options):
    options.pop("p_next", None)
    return reference.ascent_(
        case.q, case.g0, case.g1, case.offsets, case.state, sign=sign, **options
    )


def check_exact(case, **options):
    """Every element and every sum equals the oracle's; everything else stays as it was."""
    expected_d, expected_p, expected_sums = oracle(case, **options)
    written = [case.d] + ([case.p_next] if "p_next" in options else [])
    around = [surroundings(t) for t in written]
    untouched = [t for t in case.tensors() if not any(t is w for w in written)]
    before = [t.clone() for t in untouched]
    d, p_next, sums = step(case, **options)
    free = case.gaps()
    for actual, expected in ((d, expected_d), (p_next, expected_p)):
        if expected is not None:
            torch.testing.assert_close(actual[~free].double(), expected[~free], rtol=0, atol=0)
            assert (actual[free] == GUARD).all()
    torch.testing.assert_close(sums, expected_sums, rtol=0, atol=0)
    assert all(map(torch.equal, map(surroundings, written), around))
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_exactly(buffer, storage, size):
    for realised, heavy in KINDS:
        for sign in (1, -1):
            case = make_case([size], buffer, storage, exact=True, shift=size % 3)
            check_exact(case, sign=sign, **ascent_options(case, realised=realised, heavy=heavy))


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_exactly(buffer, storage, realised, heavy):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for shift, gap in itertools.product((0, 1, 3), (0, 1, 5)):
        case = make_case(sizes, buffer, storage, exact=True, shift=shift, gap=gap)
        check_exact(case, **ascent_options(case, realised=realised, heavy=heavy))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_outputs_beyond_the_cache_exactly(buffer, storage, shift):
    # gap 16 keeps the second segment aligned too; shift 1 puts everything off it.
    for realised, heavy in ((False, False), (True, True)):
        case = make_case([LARGE - 16384, 16384], buffer, storage, exact=True, gap=16, shift=shift)
        check_exact(case, **ascent_options(case, realised=realised, heavy=heavy))


def magnitudes(case, weight_decay=0.0, theta=None, momentum=0.0, p=None, p_next=None):
    """Σ|terms| of d and of y, elementwise: what their rounding errors are relative to."""
    scale, beta = (float(case.state[ops.STATE_FIELDS.index(name)]) for name in ("scale", "beta"))
    q, y, d = [], [], []
    for i, offset in enumerate(case.offsets):
        span = slice(offset, offset + case.g0[i].numel())
        q.append((scale * case.q[span].double()).abs())
        if theta is not None:  # the rounding to theta's dtype may move an element by half an ulp
            q[i] = q[i] + eps(theta[i].dtype) * theta[i].double().abs().flatten()
        tiny = torch.finfo(case.q.dtype).smallest_normal  # below it the errors shrink no more
        q[i] = q[i] + tiny
        y.append(case.g0[i].double().abs().flatten() + case.g1[i].double().abs().flatten() + tiny)
        y[i] = y[i] + weight_decay * q[i]
        w = y[i] if p is None else y[i] + (momentum * scale * p[span].double()).abs()
        d.append(q[i] + abs(beta) * w)
    return (torch.cat(x) if x else torch.zeros(0, dtype=F64) for x in (q, y, d))


def check_close(case, sign=1, **options):
    """Within the rounding of the operations on the longest path from an input to d (9 of them, each
    half an epsilon of the sum of absolute terms), twice that in a product of two."""
    expected_d, expected_p, expected_sums = oracle(case, sign=sign, **options)
    q_size, y_size, d_size = magnitudes(case, **options)
    d, p_next, sums = step(case, sign=sign, **options)
    unit = eps(d.dtype)
    used = ~case.gaps()
    assert ((d[used].double() - expected_d[used]).abs() <= 5 * unit * d_size).all()
    if p_next is not None:
        beta = abs(float(case.state[ops.STATE_FIELDS.index("beta")]))
        error = (p_next[used].double() - expected_p[used]).abs()
        assert (error <= 5 * unit * d_size / beta).all()
    for name, (a, b) in {
        "dd": (d_size, d_size),
        "qq": (q_size, q_size),
        "qy": (q_size, y_size),
        "yy": (y_size, y_size),
        "carried_q": (q_size, q_size),
        "carried_y": (q_size, y_size),
    }.items():
        error = abs(float(sums[SUM[name]] - expected_sums[SUM[name]]))
        assert error <= 10 * unit * float((a * b).sum()) + 1e-300, name


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_random_values_to_a_few_roundings(buffer, storage, realised, heavy):
    for sign in (1, -1):
        case = make_case([31, 100003, (5, 7)], buffer, storage, shift=1)
        options = ascent_options(case, realised=realised, heavy=heavy)
        check_close(case, sign=sign, **options | {"weight_decay": 0.0123})


@pytest.mark.parametrize("value", [1e-42, 1e-20, 1e15])
def test_small_and_large_values_to_a_few_roundings(value):
    case = make_case([1003])
    for tensor in (case.q, *case.g0, *case.g1):
        tensor *= value
    check_close(case)


@given(
    sizes=st.lists(st.integers(0, 70), min_size=0, max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    sign=st.sampled_from([1, -1]),
    scale=st.floats(1e-6, 1e3),
    beta=st.floats(1e-6, 1e3),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_anything_to_a_few_roundings(
    sizes, gap, shift, dtypes, kind, sign, scale, beta, weight_decay, seed
):
    case = make_case(sizes, *dtypes, gap=gap, shift=shift, seed=seed, scale=scale, beta=beta)
    realised, heavy = kind
    options = ascent_options(case, realised=realised, heavy=heavy) | {"weight_decay": weight_decay}
    check_close(case, sign=sign, **options)


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize("sizes", [[5, 70001], [LARGE]])
def test_in_place_is_the_same_to_the_bit(sizes, realised, heavy):
    case = make_case(sizes)
    options = ascent_options(case, realised=realised, heavy=heavy)
    d, _, sums = step(case, **options)
    again, _, sums_again = step(case, d=case.q, **options)
    assert_same_bits(again[~case.gaps()], d[~case.gaps()])
    assert_same_bits(sums_again, sums)


def test_d_may_lie_where_a_gradient_lies():
    case = make_case([5, 70001], gap=3)
    expected, _, sums = step(case)
    shared = [case.d[o : o + g.numel()] for o, g in zip(case.offsets, case.g1, strict=True)]
    for view, gradient in zip(shared, case.g1, strict=True):
        view.copy_(gradient)
    expected = case.clone()
    expected_d, _, expected_sums = step(expected)
    case.g1 = shared
    d, _, sums = step(case)
    assert_same_bits(d, expected_d)
    assert_same_bits(sums, expected_sums)


@pytest.mark.parametrize("storage", [BF16, F16])
def test_every_16_bit_pattern_is_read_as_torch_reads_it(storage):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(storage)
    # −0 + (x − 0)·1 is x for every x, −0 among them.
    q = torch.full((65536,), -0.0)
    d, zero = torch.empty_like(q), torch.zeros_like(patterns)
    state = ops.new_state("cpu", scale=1.0, beta=1.0)
    ops.ascent_(d, q, [zero], [patterns], [0], state)
    expected = patterns.float()
    nan = expected.isnan()
    assert torch.equal(d.isnan(), nan)
    assert_same_bits(d[~nan], expected[~nan])


def test_the_realised_displacement_is_what_recenter_left():
    for buffer, storage in DTYPES:
        case = make_case([4097, 33], buffer, storage)
        ops.recenter_(case.theta1, case.q, case.p, case.theta, case.offsets, case.state)
        _, _, sums = step(case, theta=case.theta)
        pairs = zip(case.theta1, case.theta, strict=True)
        moved = torch.cat([(a.to(buffer) - b.to(buffer)).double() for a, b in pairs])
        torch.testing.assert_close(sums[SUM["qq"]], (moved * moved).sum(), rtol=1e-13, atol=0)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    case = make_case([70001, LARGE])
    results = []
    for count in (1, 2, 2):
        with threads(count):
            d, _, sums = step(case)
            results.append((d.clone(), sums))
    for d, sums in results[1:]:
        assert_same_bits(d, results[0][0])
        assert_same_bits(sums, results[0][1])


def test_no_segments_give_zero_sums():
    case = make_case([])
    d, _, sums = step(case)
    assert torch.equal(sums, torch.zeros(6, dtype=F64)) and (d == GUARD).all()


# --- values that are not finite, or leave the range ----------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 8, 16384, 20000])
@pytest.mark.parametrize(("realised", "heavy"), KINDS)
def test_a_gradient_that_is_not_finite_shows_in_the_sums(value, at, realised, heavy):
    for which in ("g0", "g1"):
        case = make_case([20001])
        getattr(case, which)[0][at] = value
        _, _, sums = step(case, **ascent_options(case, realised=realised, heavy=heavy))
        assert not math.isfinite(sums[SUM["yy"]]) and not math.isfinite(sums[SUM["dd"]])


def test_gradients_near_the_largest_float_overflow_to_inf_not_to_a_number():
    case = make_case([100], scale=1.0, beta=1.0)
    case.g0[0].fill_(-3e38)
    case.g1[0].fill_(3e38)  # the difference has no float
    _, _, sums = step(case)
    assert not math.isfinite(sums[SUM["yy"]])
    case.g0[0].fill_(0.0)
    case.g1[0].fill_(1e37)  # its square has none either, but the sums are wider
    _, _, sums = step(case)
    assert math.isclose(sums[SUM["yy"]], 100 * float(case.g1[0][0]) ** 2, rel_tol=1e-12)
    assert math.isfinite(sums[SUM["dd"]])


@pytest.mark.parametrize("heavy", [False, True])
def test_a_separation_too_large_for_its_dtype_has_an_infinite_norm(heavy):
    case = make_case([100], scale=1.0, beta=1e3)
    case.g0[0].fill_(0.0)
    case.g1[0].fill_(1e37)
    _, _, sums = step(case, **ascent_options(case, realised=False, heavy=heavy))
    assert math.isinf(sums[SUM["dd"]]) and math.isfinite(sums[SUM["yy"]])


@pytest.mark.parametrize("beta", [float("inf"), float("nan"), 1e300])
def test_a_rate_that_is_no_rate_gives_no_finite_norm(beta):
    for which in (1, -1):
        case = make_case([100], F64, F64, beta=beta)
        case.g1[0].copy_(case.g0[0] - which * case.q[5:105])
        _, _, sums = step(case)
        assert not math.isfinite(sums[SUM["dd"]])


def test_a_double_separation_that_nearly_vanishes_keeps_its_digits():
    # d = q − q·(1 − 1e-9): a norm from sums of q and y would have no digit left.
    case = make_case([1000], F64, F64, scale=1.0, beta=1.0)
    case.g0[0].zero_()
    case.g1[0].copy_(case.q[5:1005] * (1 - 1e-9))
    d, _, sums = step(case, sign=-1)
    norm = (d[5:1005] ** 2).sum()
    torch.testing.assert_close(sums[SUM["dd"]], norm, rtol=1e-12, atol=0)


def test_subnormal_gradients_count():
    case = make_case([64], scale=0.0, beta=1.0)
    case.g0[0].zero_()
    case.g1[0].fill_(1e-45)
    d, _, sums = step(case)
    assert (d[5:69] == 1e-45).all()
    assert float(sums[SUM["yy"]]) == 64 * float(case.g1[0][0]) ** 2 > 0


# --- wrong arguments ------------------------------------------------------------------------------


def strided(n, dtype=F32):
    return torch.zeros(2 * n, dtype=dtype)[::2]


WRONG = {
    "q dtype": ({"q": torch.zeros(40, dtype=F16)}, "q: expected float32 or float64"),
    "q dim": ({"q": torch.zeros(4, 10)}, "q: expected a contiguous 1-D"),
    "q strided": ({"q": strided(40)}, "q: expected a contiguous 1-D"),
    "d dtype": ({"d": torch.zeros(40, dtype=F64)}, "d: dtype"),
    "d size": ({"d": torch.zeros(39)}, "d: 39 elements"),
    "d strided": ({"d": strided(40)}, "d: expected a contiguous"),
    "g0 count": ({"g0": [torch.zeros(10)]}, "g0: 1 tensors, but offsets has 2"),
    "offsets count": ({"offsets": [0, 10, 20]}, "offsets has 3"),
    "g0 dtype": ({"g0": [torch.zeros(10, dtype=F64)] * 2}, r"g0\[0\]: dtype"),
    "g0 mixed": ({"g0": [torch.zeros(10), torch.zeros(12, dtype=BF16)]}, r"g0\[1\]: dtype"),
    "g0 strided": ({"g0": [torch.zeros(10), strided(12)]}, r"g0\[1\]: expected a contiguous"),
    "g0 integer": ({"g0": [torch.zeros(10, dtype=torch.int32)] * 2}, r"g0\[0\]: dtype"),
    "g1 count": ({"g1": [torch.zeros(10)]}, "g1: 1 tensors"),
    "g1 size": ({"g1": [torch.zeros(10), torch.zeros(11)]}, r"g1\[1\]: 11 elements"),
    "g1 dtype": (
        {"g1": [torch.zeros(10, dtype=BF16), torch.zeros(12, dtype=BF16)]},
        r"g1\[0\]: dtype",
    ),
    "offset negative": ({"offsets": [-1, 20]}, r"offsets\[0\]: -1"),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "offset huge": ({"offsets": [0, 2**63 - 1]}, r"offsets\[1\]: "),
    "state dtype": ({"state": torch.zeros(14)}, "state: expected"),
    "state size": ({"state": torch.zeros(13, dtype=F64)}, "state: expected"),
    "state strided": ({"state": strided(14, F64)}, "state: expected"),
    "sign": ({"sign": 0}, "sign: expected 1"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors"),
    "theta size": ({"theta": [torch.zeros(10), torch.zeros(13)]}, r"theta\[1\]: 13"),
    "theta dtype": (
        {"theta": [torch.zeros(10, dtype=F16), torch.zeros(12, dtype=F16)]},
        r"theta\[0\]: dtype",
    ),
    "theta strided": ({"theta": [torch.zeros(10), strided(12)]}, r"theta\[1\]: expected"),
    "p alone": ({"p": torch.zeros(40)}, "p, p_next: give both"),
    "p_next alone": ({"p_next": torch.zeros(40)}, "p, p_next: give both"),
    "p size": ({"p": torch.zeros(41), "p_next": torch.zeros(40)}, "p: 41 elements"),
    "p_next size": ({"p": torch.zeros(40), "p_next": torch.zeros(41)}, "p_next: 41 elements"),
    "p_next dtype": (
        {"p": torch.zeros(40), "p_next": torch.zeros(40, dtype=F64)},
        "p_next: dtype",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    d = guarded(40, F32)
    arguments = {
        "d": d,
        "q": torch.ones(40),
        "g0": [torch.ones(10), torch.ones(12)],
        "g1": [torch.ones(10), torch.ones(12)],
        "offsets": [0, 20],
        "state": ops.new_state("cpu", scale=1.0, beta=1.0),
    }
    ops.ascent_(**{**arguments, "d": torch.zeros(40)})
    arguments |= replaced
    written = [t for t in (arguments["d"], arguments.get("p_next")) if t is not None]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        ops.ascent_(**arguments)
    for now, then in zip(written, before, strict=True):
        assert_same_bits(now, then)
