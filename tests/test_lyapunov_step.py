"""lyapunov_step_ against the three ops it is made of, to the last bit, and its fp64 oracle."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops, reference
from ops_support import (
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
    state_with,
    surroundings,
    threads,
)

LOSSES = torch.tensor([0.3, 0.4], dtype=F64)
OPTIONS = [
    {"sign": sign, "estimate": estimate, "alternate": alternate, "ema": 0.5}
    for sign, estimate, alternate in itertools.product((1, -1), (0, 1, 2, 3), (True, False))
]


def in_turn(case, losses, *, realised=False, weight_decay=0.0, **options):
    """The three ops; afterwards case.q is the separation, as lyapunov_step_ leaves it."""
    theta = case.theta if realised else None
    spare = case.d.clone()
    sums = ops.ascent_(
        spare,
        case.q,
        case.g0,
        case.g1,
        case.offsets,
        case.state,
        sign=options.get("sign", 1),
        weight_decay=weight_decay,
        theta=theta,
    )
    ops.exponent_(case.state, sums, losses, **options)
    ops.recenter_(case.theta1, spare, case.q, case.theta, case.offsets, case.state)
    used = ~case.gaps()
    case.q[used] = spare[used]


def one_op(case, losses, **options):
    ops.lyapunov_step_(
        case.theta1,
        case.q,
        case.g0,
        case.g1,
        case.theta,
        case.offsets,
        case.state,
        losses,
        **options,
    )


def check(case, losses=LOSSES, **options):
    twin = case.clone()
    in_turn(twin, losses, **options)
    written = [case.q, *case.theta1]
    around = [surroundings(t) for t in written]
    one_op(case, losses, **options)
    for name in ("q", "state"):
        assert_same_bits(getattr(case, name), getattr(twin, name))
    for name in ("theta1", "theta", "g0", "g1"):
        for a, b in zip(getattr(case, name), getattr(twin, name), strict=True):
            assert_same_bits(a, b)
    assert all(map(torch.equal, map(surroundings, written), around))
    assert (case.q[case.gaps()] == GUARD).all()
    return case


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_to_the_bit(buffer, storage, size):
    for realised in (False, True):
        check(make_case([size], buffer, storage, shift=size % 3), realised=realised)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_to_the_bit(buffer, storage, options):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for (shift, gap), realised in itertools.product([(0, 0), (1, 1), (3, 5)], (False, True)):
        case = make_case(sizes, buffer, storage, shift=shift, gap=gap)
        check(case, realised=realised, weight_decay=0.1, control=gap != 1, **options)


@given(
    sizes=st.lists(st.integers(0, 70), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
    realised=st.booleans(),
    scale=st.floats(1e-6, 1e3),
    beta=st.floats(0.0, 1e3),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(
    sizes, gap, shift, dtypes, options, realised, scale, beta, weight_decay, seed
):
    case = make_case(sizes, *dtypes, gap=gap, shift=shift, seed=seed, scale=scale, beta=beta)
    check(case, realised=realised, weight_decay=weight_decay, **options)


def test_the_oracle_agrees():
    case = make_case([4097, (5, 7)], F64, F64)
    arguments = (case.g0, case.g1, case.theta, case.offsets, case.state.clone(), LOSSES)
    theta1, q, state = reference.lyapunov_step_(case.q, *arguments, weight_decay=0.1)
    one_op(case, LOSSES, weight_decay=0.1)
    torch.testing.assert_close(case.q, q, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(case.state, state, rtol=1e-12, atol=0, equal_nan=True)
    for a, b in zip(case.theta1, theta1, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("which", ["loss", "gradient", "met"])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_a_step_that_does_not_count_keeps_the_separation(buffer, storage, which):
    case = make_case([70001, 33], buffer, storage)
    losses = LOSSES.clone()
    if which == "loss":
        losses[1] = math.nan
    elif which == "gradient":
        case.g1[0][40000] = math.inf
    else:  # y = −q/β: whole powers of two, so that nothing is left
        case.state = state_with(case.state, scale=1.0, beta=0.5)
        for offset, g0, g1 in zip(case.offsets, case.g0, case.g1, strict=True):
            q = case.q[offset : offset + g0.numel()]
            q.copy_(q.mul(4).round())
            g0.zero_()
            g1.copy_(-2 * q)
    q = case.q.clone()
    check(case, losses)
    assert_same_bits(case.q, q)
    committed, accepted = (case.state[ops.STATE_FIELDS.index(n)] for n in ("committed", "accepted"))
    assert committed == 0 and accepted == float(which == "met")
    scale = case.state[ops.STATE_FIELDS.index("scale")]
    for theta1, theta, offset in zip(case.theta1, case.theta, case.offsets, strict=True):
        moved = theta.to(buffer) + q[offset : offset + theta.numel()] * scale.to(buffer)
        assert_same_bits(theta1, moved.to(storage))


@pytest.mark.parametrize("realised", [False, True])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_theta1_may_be_the_gradients(buffer, storage, realised):
    for beta in (0.213, math.nan):  # committed and not
        case = make_case([7, 16385, (), 3], buffer, storage, shift=1, beta=beta)
        twin = case.clone()
        one_op(twin, LOSSES, realised=realised)
        case.theta1 = case.g1
        one_op(case, LOSSES, realised=realised)
        assert_same_bits(case.q, twin.q)
        assert_same_bits(case.state, twin.state)
        for a, b in zip(case.theta1, twin.theta1, strict=True):
            assert_same_bits(a, b)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_case([70001, LARGE], F32, F16)
        with threads(count):
            one_op(case, LOSSES, realised=True)
        results.append([case.q, case.state, *case.theta1])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


def test_no_segments_count_as_a_step_that_is_not_finite():
    case = make_case([])
    one_op(case, LOSSES)
    assert (case.q == GUARD).all()
    assert case.state[ops.STATE_FIELDS.index("skipped")] == 1


def test_the_version_of_what_is_written_counts():
    case = make_case([5, 3])
    written = [case.q, case.state, *case.theta1]
    before = [t._version for t in written]
    one_op(case, LOSSES)
    assert all(t._version > v for t, v in zip(written, before, strict=True))


def pair(dtype=F32, first=10, second=12):
    return [torch.ones(first, dtype=dtype), torch.ones(second, dtype=dtype)]


WRONG = {
    "q dtype": ({"q": torch.zeros(40, dtype=F16)}, "q: expected float32 or float64"),
    "q dim": ({"q": torch.zeros(1, 40)}, "q: expected a contiguous 1-D"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors, but offsets has 2"),
    "theta1 size": ({"theta1": pair(second=11)}, r"theta1\[1\]: 11 elements"),
    "theta1 dtype": ({"theta1": pair(BF16)}, r"theta1\[0\]: dtype"),
    "g0 dtype": ({"g0": pair(BF16)}, r"g0\[0\]: dtype"),
    "g0 size": ({"g0": pair(second=13)}, r"g0\[1\]: 13 elements"),
    "g1 dtype": ({"g1": pair(F64)}, r"g1\[0\]: dtype"),
    "g1 count": ({"g1": [torch.zeros(10)]}, "g1: 1 tensors"),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "state size": ({"state": torch.zeros(15, dtype=F64)}, "state: expected"),
    "losses dtype": ({"losses": torch.zeros(2)}, "losses: expected"),
    "sign": ({"sign": 2}, "sign: expected 1"),
    "estimate": ({"estimate": 4}, "estimate: expected 0 to 3, got 4"),
    "ema": ({"ema": 1.0}, "ema: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "theta1": pair(),
        "q": torch.ones(40),
        "g0": pair(),
        "g1": pair(),
        "theta": pair(),
        "offsets": [0, 20],
        "state": ops.new_state("cpu", scale=1.0, beta=1.0, perturbation=1.0),
        "losses": LOSSES,
    }
    arguments |= replaced
    written = [arguments["q"], arguments["state"], *arguments["theta1"]]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        ops.lyapunov_step_(**arguments)
    for now, then in zip(written, before, strict=True):
        assert_same_bits(now, then)
