"""panel_ascent_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

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
    KINDS,
    SUM,
    assert_same_bits,
    make_case,
    surroundings,
    threads,
)
from panel_cases import (
    COUNTS,
    LARGE,
    TAILS,
    ascent_bits,
    close_sums,
    make_panel_case,
    panel_ascent_options,
    zero_panel,
)


def step(case, sign=1, d=None, g1=None, **options):
    return ops.panel_ascent_(
        case.d if d is None else d,
        case.q,
        case.g0,
        case.g1 if g1 is None else g1,
        case.offsets,
        case.state,
        sign=sign,
        **options,
    )


def check(case, sign, realised, heavy, weight_decay=0.5):
    """Every element to the bit, the Gram matrix to its rounding, the rest as it was."""
    options = panel_ascent_options(case, realised=realised, heavy=heavy, weight_decay=weight_decay)
    d, w, rows = ascent_bits(case, sign, realised, heavy, weight_decay)
    written = [case.d, case.p_next] if heavy else [case.d]
    around = [surroundings(t.view(-1)) for t in written]
    untouched = [t for t in case.tensors() if not any(t is x for x in written)]
    before = [t.clone() for t in untouched]
    gram = step(case, sign, **options)
    used = case.used()
    for actual, expected in zip(written, (d, w), strict=False):
        assert_same_bits(actual[:, used], expected[:, used])
        assert (actual[:, ~used] == GUARD).all()
    assert gram.shape == (rows.shape[0],) * 2 and gram.dtype == F64
    assert_same_bits(gram, gram.T.contiguous())
    close_sums(gram, rows, rows)
    assert all(map(torch.equal, [surroundings(t.view(-1)) for t in written], around))
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)
    return gram


@pytest.mark.parametrize("size", TAILS)
@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_every_size_to_the_bit(buffer, storage, k, size):
    for (realised, heavy), sign in itertools.product(KINDS, (1, -1)):
        case = make_panel_case(k, [size], buffer, storage, shift=size % 3)
        check(case, sign, realised, heavy)


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_segments_of_every_kind_to_the_bit(buffer, storage, realised, heavy):
    sizes = [9, 0, (), (3, 0, 2), 4097, (33, 7), 1]
    for k, shift, gap in itertools.product((1, 3, 6), (0, 1, 3), (0, 1, 5)):
        case = make_panel_case(k, sizes, buffer, storage, shift=shift, gap=gap)
        check(case, 1, realised, heavy, weight_decay=0.0123)


@given(
    k=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 300), max_size=4),
    gap=st.integers(0, 9),
    shift=st.integers(0, 9),
    dtypes=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    sign=st.sampled_from([1, -1]),
    beta=st.floats(0.0, 1e3),
    weight_decay=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_anything_to_the_bit(k, sizes, gap, shift, dtypes, kind, sign, beta, weight_decay, seed):
    case = make_panel_case(k, sizes, *dtypes, gap=gap, shift=shift, seed=seed, beta=beta)
    check(case, sign, *kind, weight_decay)


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_the_oracle_agrees(buffer, storage, realised, heavy):
    # Exactly, where whole numbers and powers of two leave nothing to round.
    for k, sign in itertools.product((1, 3, 14), (1, -1)):
        case = make_panel_case(k, [4097, (5, 7)], buffer, storage, exact=True)
        options = panel_ascent_options(case, realised=realised, heavy=heavy)
        known = {name: value for name, value in options.items() if name != "p_next"}
        d, p_next, gram = panel_reference.panel_ascent_(
            case.q, case.g0, case.g1, case.offsets, case.state, sign=sign, **known
        )
        assert torch.equal(step(case, sign, **options), gram)
        used = case.used()
        assert torch.equal(case.d[:, used].double(), d[:, used])
        assert not heavy or torch.equal(case.p_next[:, used].double(), p_next[:, used])


@pytest.mark.parametrize("realised", [False, True])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_one_row_is_ascent(buffer, storage, realised):
    single = make_case([31, 4097], buffer, storage, scale=1.0, beta=0.213)
    state = ops.new_panel_state("cpu", 1, beta=0.213)
    g1 = torch.zeros(single.q.shape, dtype=storage)
    for offset, g in zip(single.offsets, single.g1, strict=True):
        g1[offset : offset + g.numel()] = g
    theta = single.theta if realised else None
    d = torch.full_like(single.q, GUARD)[None]
    gram = ops.panel_ascent_(
        d, single.q[None], single.g0, g1[None], single.offsets, state, theta=theta
    )
    sums = ops.ascent_(
        single.d, single.q, single.g0, single.g1, single.offsets, single.state, theta=theta
    )
    assert_same_bits(d[0], single.d)
    last = 2 if realised else 0
    pairs = {"qq": (last, last), "qy": (last, 1), "yy": (1, 1)}
    pairs |= {"carried_q": (0, last), "carried_y": (0, 1)}
    for name, (i, j) in pairs.items():
        torch.testing.assert_close(gram[i, j], sums[SUM[name]], rtol=1e-11, atol=0)


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_d_may_be_g1_or_q(dtype, realised, heavy):
    for k, sizes in ((3, [7, 4097, (), 33]), (1, [5])):
        for where in ("g1", "q"):
            case = make_panel_case(k, sizes, dtype, dtype, shift=1)
            twin = make_panel_case(k, sizes, dtype, dtype, shift=1)
            expected = step(twin, **panel_ascent_options(twin, realised=realised, heavy=heavy))
            options = panel_ascent_options(case, realised=realised, heavy=heavy)
            d = getattr(case, where)
            assert_same_bits(step(case, d=d, **options), expected)
            used = case.used()
            assert_same_bits(d[:, used], twin.d[:, used])
            assert (d[:, ~used] == GUARD).all()
            assert_same_bits(case.p_next, twin.p_next)


def test_the_realised_displacement_is_what_panel_recenter_left():
    for buffer, storage in DTYPES:
        case = make_panel_case(3, [4097, 33], buffer, storage)
        ops.panel_recenter_(case.q, case.copies, case.d, case.theta, case.offsets, case.state)
        gram = step(case, theta=case.theta)
        used = case.used()
        moved = case.copies.to(buffer)[:, used] - case.flat(case.theta)[used]
        close_sums(gram[6:, 6:], moved, moved)
        close_sums(gram[:3, 6:], case.q[:, used], moved)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    for k, sizes in ((5, [LARGE, 70001]), (32, [20000])):
        results = []
        for count in (1, 2, 2):
            case = make_panel_case(k, sizes, F32, F16)
            with threads(count):
                results.append((step(case, theta=case.theta), case.d))
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert_same_bits(a, b)


def test_a_panel_of_many_segments_and_runs_adds_up():
    check(make_panel_case(2, [70001] * 5 + [100] * 200, F32, BF16), 1, True, False)


def test_no_segments_give_zeros():
    case = make_panel_case(3, [])
    assert torch.equal(step(case), torch.zeros(6, 6, dtype=F64)) and (case.d == GUARD).all()
    heavy = step(case, momentum=0.5, p=case.p, p_next=case.p_next, theta=[])
    assert torch.equal(heavy, torch.zeros(12, 12, dtype=F64))


# --- values that are not finite, or leave the range ----------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 8, 256, 4096, 5000])
def test_a_gradient_that_is_not_finite_shows_in_the_gram_matrix(value, at):
    for realised, heavy in KINDS:
        case = make_panel_case(3, [5001])
        case.g1[1, case.offsets[0] + at] = value
        gram = step(case, **panel_ascent_options(case, realised=realised, heavy=heavy))
        assert gram[3, 3].isfinite() and not gram[4, 4].isfinite()
        case = make_panel_case(3, [5001])
        case.g0[0][at] = value
        gram = step(case, **panel_ascent_options(case, realised=realised, heavy=heavy))
        assert not gram.diag()[3:6].isfinite().any()


@pytest.mark.parametrize(("realised", "heavy"), KINDS)
def test_a_separation_too_large_for_its_dtype_is_not_finite(realised, heavy):
    case = make_panel_case(2, [100], beta=1e3)
    case.g0[0].zero_()
    case.g1.fill_(1e-3)
    case.g1[1].fill_(1e37)
    gram = step(case, **panel_ascent_options(case, realised=realised, heavy=heavy))
    assert gram[2, 2].isfinite() and not gram[3, 3].isfinite()
    assert not case.d[1, case.used()].isfinite().any()


@pytest.mark.parametrize("beta", [math.inf, math.nan, 1e300])
def test_a_rate_that_is_no_rate_gives_no_finite_gram_matrix(beta):
    for dtype, (realised, heavy) in itertools.product((F32, F64), KINDS):
        case = make_panel_case(2, [100], dtype, dtype, beta=beta)
        case.g1.mul_(1e200 if dtype == F64 else 1.0)
        gram = step(case, **panel_ascent_options(case, realised=realised, heavy=heavy))
        assert not gram.isfinite().all()


# --- wrong arguments ------------------------------------------------------------------------------


def test_the_version_of_what_is_written_counts():
    case = make_panel_case(2, [5, 3])
    before = case.d._version, case.p_next._version, case.q._version
    step(case, momentum=0.5, p=case.p, p_next=case.p_next)
    assert case.d._version > before[0] and case.p_next._version > before[1]
    assert case.q._version == before[2]


WHOLE = zero_panel(7)
HALVES = WHOLE.view(-1).view(BF16)[: 3 * 40].view(3, 40)
WRONG = {
    "d in q": ({"q": WHOLE[:3], "d": WHOLE[1:4]}, "d: shares memory with q"),
    "d in g1": ({"g1": WHOLE[:3], "d": WHOLE[1:4]}, "d: shares memory with g1"),
    "d in p": (
        {"p": WHOLE[:3], "d": WHOLE[1:4], "p_next": zero_panel()},
        "d: shares memory with p",
    ),
    "p_next in p": ({"p": WHOLE[:3], "p_next": WHOLE[1:4]}, "p_next: shares memory with p"),
    "d over g1 of another dtype": (
        {"g1": HALVES, "d": WHOLE[:3], "g0": [torch.ones(n, dtype=BF16) for n in (10, 12)]},
        "d: shares memory with g1, but is not the same elements",
    ),
    "q dtype": ({"q": zero_panel(dtype=F16)}, "q: expected float32 or float64"),
    "q dim": ({"q": torch.zeros(40)}, "q: expected a contiguous 2-D"),
    "q strided": ({"q": zero_panel(40, 3).T}, "q: expected a contiguous 2-D"),
    "q rows": ({"q": zero_panel(33)}, "q: 33 rows, expected 1 to 32"),
    "q empty": ({"q": zero_panel(0)}, "q: 0 rows"),
    "d dtype": ({"d": zero_panel(dtype=F64)}, "d: dtype"),
    "d rows": ({"d": zero_panel(2)}, "d: 2 rows, but q has 3"),
    "d length": ({"d": zero_panel(3, 39)}, "d: rows of 39 elements, but q has rows of 40"),
    "g0 count": ({"g0": [torch.zeros(10)]}, "g0: 1 tensors, but offsets has 2"),
    "g0 dtype": ({"g0": [torch.zeros(10, dtype=F64)] * 2}, r"g0\[0\]: dtype"),
    "g0 strided": ({"g0": [torch.zeros(10), torch.zeros(24)[::2]]}, r"g0\[1\]: expected"),
    "g1 dtype": ({"g1": zero_panel(dtype=BF16)}, "g1: dtype BFloat16 differs from g0's Float"),
    "g1 wide": ({"g1": zero_panel(dtype=F64)}, "g1: dtype Double can't go with a Float buffer"),
    "g1 rows": ({"g1": zero_panel(4)}, "g1: 4 rows of 40, but q has 3 of 40"),
    "g1 length": ({"g1": zero_panel(3, 41)}, "g1: 3 rows of 41, but q has 3 of 40"),
    "g1 strided": ({"g1": zero_panel(40, 3).T}, "g1: expected a contiguous 2-D"),
    "offset beyond": ({"offsets": [0, 29]}, r"offsets\[1\]: 29"),
    "offset inside": ({"offsets": [0, 9]}, r"offsets\[1\]: 9 lies inside"),
    "state size": ({"state": ops.new_panel_state("cpu", 2)}, "state: expected 50 elements"),
    "state dtype": ({"state": torch.zeros(50)}, "state: expected a contiguous float64"),
    "sign": ({"sign": 0}, "sign: expected 1"),
    "theta count": ({"theta": [torch.zeros(10)]}, "theta: 1 tensors"),
    "theta dtype": (
        {"theta": [torch.zeros(10, dtype=F16), torch.zeros(12, dtype=F16)]},
        r"theta\[0\]: dtype",
    ),
    "p alone": ({"p": zero_panel()}, "p, p_next: give both"),
    "p_next alone": ({"p_next": zero_panel()}, "p, p_next: give both"),
    "momentum alone": ({"momentum": 0.5}, "momentum: 0.5 needs p and p_next"),
    "p rows": ({"p": zero_panel(2), "p_next": zero_panel()}, "p: 2 rows, but q has 3"),
    "p_next dtype": ({"p": zero_panel(), "p_next": zero_panel(dtype=F64)}, "p_next: dtype"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "d": torch.full((3, 40), GUARD),
        "q": torch.ones(3, 40),
        "g0": [torch.ones(10), torch.ones(12)],
        "g1": torch.ones(3, 40),
        "offsets": [0, 20],
        "state": ops.new_panel_state("cpu", 3, beta=1.0),
    }
    ops.panel_ascent_(**{**arguments, "d": torch.zeros(3, 40)})
    arguments |= replaced
    written = [t for t in (arguments["d"], arguments.get("p_next")) if t is not None]
    before = [t.clone() for t in written]
    with pytest.raises(RuntimeError, match=message):
        ops.panel_ascent_(**arguments)
    for now, then in zip(written, before, strict=True):
        assert_same_bits(now, then)
