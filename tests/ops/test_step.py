"""ascent_ and recenter_: conversions, values at the ends of a dtype, what isn't finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from op_inputs import BF16, DTYPES, F16, F32, F64, assert_same_bits
from op_table import TABLE, check, check_call

pytestmark = pytest.mark.usefixtures("backend")

ASCENT, RECENTER = TABLE["ascent_"], TABLE["recenter_"]
FORMS = list(ASCENT.forms)
HALVES = [BF16, F16]


def called(form, k=1, sizes=(5001,), dtypes=(F32, F32), change=lambda a: None, **state):
    """(arguments, Gram matrix) of an ascent_ whose arguments were changed before."""
    a = ASCENT.draw(ASCENT.inputs(list(sizes), k, *dtypes), **ASCENT.forms[form], **state)
    change(a)
    return a, ASCENT.call(a)


# --- any numbers ---------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 300), max_size=4),
    k=st.integers(1, 9),
    dtypes=st.sampled_from(DTYPES),
    form=st.sampled_from(FORMS),
    transform=st.floats(2.0**-20, 2.0**10, width=32),
    beta=st.floats(0.0, 1e3),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_any_rate_transform_and_weight_decay(
    sizes, k, dtypes, form, transform, beta, weight_decay, seed
):
    inputs = ASCENT.inputs(sizes, k, *dtypes, shift=seed % 10, gap=seed % 7, seed=seed)
    a = ASCENT.draw(inputs, **ASCENT.forms[form], beta=beta, transform=transform)
    check_call(ASCENT, inputs, a | {"weight_decay": weight_decay})


@pytest.mark.parametrize("value", [1e-42, 1e-20, 1e15])
def test_small_and_large_values_to_a_few_roundings(value):
    for k in (1, 3):
        inputs = ASCENT.inputs([1003], k)
        a = ASCENT.arguments(inputs, "plain")
        for tensor in (a["q"], *a["g0"], a["g1"]):
            tensor *= value
        check_call(ASCENT, inputs, a)


@pytest.mark.parametrize("transform", [0.0371, -0.0371, 1e-30, 0.0, 1e3])
def test_any_transform_of_one_separation(transform):
    for buffer, storage in DTYPES:
        for pending in (0.0, 1.0):
            inputs = RECENTER.inputs([31, 4097, (5, 7)], 1, buffer, storage, shift=1)
            rounded = torch.tensor(transform, dtype=buffer).double()
            a = RECENTER.draw(inputs, transform=rounded, pending=pending)
            check_call(RECENTER, inputs, a)


def test_many_segments_and_runs_add_up():
    check(ASCENT, ASCENT.inputs([70001] * 5 + [100] * 200, 2, F32, BF16), "realised")


def test_what_was_realised_is_what_recenter_left():
    for k in (1, 3):
        for buffer, storage in DTYPES:
            inputs = ASCENT.inputs([4097, 33], k, buffer, storage)
            a, copies = ASCENT.arguments(inputs, "realised"), inputs.panel(dtype=storage)
            pending = ops.state_field(a["state"], k, "pending")
            pending.fill_(float(k == 1))
            ops.recenter_(a["q"], copies, a["d"], a["theta"], a["offsets"], a["state"])
            gram = ASCENT.call(a)
            used, theta = inputs.used, torch.zeros(inputs.n, dtype=F64)
            for offset, t in zip(inputs.offsets, a["theta"], strict=True):
                theta[offset : offset + t.numel()] = t.double()
            moved = (copies.double() - theta)[:, used]
            expected = moved @ moved.T
            torch.testing.assert_close(gram[2 * k :, 2 * k :], expected, rtol=1e-6, atol=1e-12)


# --- conversions ---------------------------------------------------------------------------------


def patterns_of(storage):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(storage)


def assert_same_numbers(actual, expected):
    """To the bit, but for a NaN's payload, which is nobody's business."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert_same_bits(actual[~nan], expected[~nan])


def cast(values, storage):
    """``values`` as recenter_ stores them: θ = −0 leaves every value as it is."""
    theta, state = torch.full(values.shape, -0.0, dtype=storage), ops.new_state("cpu")
    copies = torch.empty_like(theta)[None]
    ops.recenter_(values[None], copies, torch.empty_like(values)[None], [theta], [0], state)
    return copies[0]


@pytest.mark.parametrize("storage", HALVES)
def test_every_16_bit_pattern_is_read_as_torch_reads_it(storage):
    # −0 + (x − 0)·1 is x for every x, −0 among them.
    q, patterns = torch.full((1, 65536), -0.0), patterns_of(storage)
    d, zero = torch.empty_like(q), torch.zeros_like(patterns)
    ops.ascent_(d, q, [zero], patterns[None], [0], ops.new_state("cpu", beta=1.0))
    assert_same_numbers(d[0], patterns.float())


@pytest.mark.parametrize("storage", HALVES)
def test_every_16_bit_pattern_is_read_and_stored_unchanged(storage):
    q, patterns = torch.full((1, 65536), -0.0), patterns_of(storage)
    copies = torch.empty_like(patterns)[None]
    ops.recenter_(q, copies, torch.empty_like(q), [patterns], [0], ops.new_state("cpu"))
    assert_same_numbers(copies[0], patterns)


LOW_HALVES = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x5000, 0x7000, 0x7FFF]
LOW_HALVES += [0x8000, 0x8001, 0x9000, 0xB000, 0xF000, 0xFFFF]


@pytest.mark.parametrize("storage", HALVES)
def test_stores_round_as_torch_casts(storage):
    # Every upper half of a float with the lower halves around both types' ties, and at random:
    # all exponents, subnormals, ties to even, overflow, ±0, ±inf and NaN.
    high = torch.arange(65536, dtype=torch.int64) << 16
    generator = torch.Generator().manual_seed(0)
    lows = [torch.full_like(high, low) for low in LOW_HALVES]
    lows += [torch.randint(0, 65536, high.shape, generator=generator) for _ in range(4)]
    for low in lows:
        values = (high + low).to(torch.int32).view(F32)
        assert_same_numbers(cast(values, storage), values.to(storage))


def test_the_largest_half_and_the_first_value_beyond():
    values = torch.tensor([65504.0, 65519.996, 65520.0, -65520.0, 1e38, 2.0**-25, 2.0**-25 * 1.001])
    expected = [65504.0, 65504.0, math.inf, -math.inf, math.inf, 0.0, 2.0**-24]
    assert_same_bits(cast(values, F16), torch.tensor(expected, dtype=F16))


# --- values that are not finite, or leave the range ----------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 8, 256, 4096, 5000])
def test_a_gradient_that_is_not_finite_shows_in_the_gram_matrix(value, at):
    for form in FORMS:
        _, gram = called(form, change=lambda a: a["g1"][0, 5 + at :].fill_(value))
        assert not gram[1, 1].isfinite()
        _, gram = called(form, 3, change=lambda a: a["g1"][1, 5 + at :].fill_(value))
        assert gram[3, 3].isfinite() and not gram[4, 4].isfinite()
        _, gram = called(form, 3, change=lambda a: a["g0"][0][at:].fill_(value))
        assert not gram.diag()[3:6].isfinite().any()


def test_gradients_near_the_largest_float_overflow_to_inf_not_to_a_number():
    def far(a):
        a["g0"][0].fill_(-3e38)
        a["g1"].fill_(3e38)  # the difference has no float

    def large(a):
        a["g0"][0].zero_()
        a["g1"].fill_(1e37)  # its square has no float, but the sums are wider
        a["weight_decay"] = 0.0

    for k in (1, 2):
        assert not called("plain", k, change=far, beta=1.0)[1].diag()[k:].isfinite().any()
        a, gram = called("plain", k, [100], change=large, beta=1.0)
        expected = 100 * float(a["g1"][0, 5]) ** 2
        torch.testing.assert_close(gram.diag()[k:], torch.full((k,), expected, dtype=F64))


@pytest.mark.parametrize("form", FORMS)
def test_a_separation_too_large_for_its_dtype_has_an_infinite_gradient(form):
    def large(a):
        a["g0"][0].zero_()
        a["g1"].fill_(1e-3)
        a["g1"][-1].fill_(1e37)

    for k in (1, 2):
        _, gram = called(form, k, change=large, beta=1e3)
        assert math.isinf(gram[2 * k - 1, 2 * k - 1])
        assert k == 1 or gram[2, 2].isfinite()


@pytest.mark.parametrize("beta", [math.inf, math.nan, 1e300])
def test_a_rate_that_is_no_rate_gives_no_finite_gram_matrix(beta):
    for dtype in (F32, F64):
        for form in FORMS:
            for k in (1, 2):
                factor = 1e200 if dtype == F64 else 1.0
                change = {"dtypes": (dtype, dtype), "change": lambda a, by=factor: a["g1"].mul_(by)}
                assert not called(form, k, beta=beta, **change)[1].isfinite().all()


def test_subnormal_gradients_count():
    def tiny(a):
        a["q"].zero_()
        a["g0"][0].zero_()
        a["g1"].fill_(1e-45)

    a, gram = called("plain", sizes=[64], change=tiny, beta=1.0)
    assert (a["d"][0, 5:69] == 1e-45).all()
    assert float(gram[1, 1]) == 64 * float(a["g1"][0, 5]) ** 2 > 0


@pytest.mark.parametrize("k", [1, 3])
def test_a_transform_that_is_not_finite_does_not_reach_q_unless_it_is_asked_for(k):
    inputs = RECENTER.inputs([100], k)
    # One separation is q as it lies where a step is pending, several where none is.
    a = RECENTER.draw(inputs, transform=math.inf, pending=float(k == 1))
    before = a["q"].clone()
    RECENTER.call(a)
    assert_same_bits(a["q"], before)
    assert k > 1 or not a["copies"][0, inputs.used].isfinite().any()


def test_the_transform_of_benettin_makes_an_orthonormal_panel():
    generator, n = torch.Generator().manual_seed(1), 4097
    curvature = torch.rand(n, generator=generator, dtype=F64) * 4 - 1
    for k in (1, 5):
        inputs = ASCENT.inputs([n], k, F64, F64, gap=0)
        a = ASCENT.draw(inputs, transform=1.0)
        a["g0"][0].zero_()
        a["g1"].copy_(a["q"] * curvature)
        a["weight_decay"], state = 0.0, a["state"]
        ops.benettin_(state, ASCENT.call(a), torch.zeros(2, dtype=F64), k)
        q, d = (a["q"], a["d"]) if k > 1 else (a["d"], a["q"])
        copies = torch.empty_like(q)
        ops.recenter_(q, copies, d, [torch.zeros(n, dtype=F64)], [0], state)
        expected = 0.25 * torch.eye(k, dtype=F64)  # Δq = 0.5
        torch.testing.assert_close(ops.gram(copies, copies), expected, rtol=0, atol=1e-13)
