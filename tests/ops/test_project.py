"""project_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import BF16, F32, F64, assert_same_bits, eps, surroundings, threads
from panel_cases import LARGE, ROWS, TAILS, close_sums, random_panel


def inputs(m, n, dtype, shift=0, seed=0, exact=False):
    w = random_panel(1, n, dtype, shift, seed, exact)[0]
    v = random_panel(max(m, 1), n, dtype, shift, seed + 1, exact)[:m]
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(-3, 4, (m,), generator=generator).double() / 4
    return w, v, c if exact else c + torch.randn(m, generator=generator, dtype=F64)


def projected_bits(w, v, c):
    for row, factor in zip(v, c.to(w.dtype), strict=True):
        w = w - row * factor
    return w


def check(m, n, dtype, shift=0, seed=0):
    w, v, c = inputs(m, n, dtype, shift, seed)
    expected, before, around = projected_bits(w, v, c), v.clone(), surroundings(w)
    oracle, _ = panel_reference.project_(w, v, c)
    size = w.double().abs() + c.abs() @ v.double().abs()
    products = ops.project_(w, v, c)
    assert products.shape == (m + 1,) and products.dtype == F64
    assert_same_bits(w, expected)
    assert_same_bits(v, before)
    assert torch.equal(surroundings(w), around)
    assert ((w.double() - oracle).abs() <= (m + 2) * eps(dtype) * size + 1e-300).all()
    close_sums(products[:, None], torch.cat([v, w[None]]), w[None])


@pytest.mark.parametrize("n", [*TAILS, 511, 513])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_size_to_the_bit(dtype, n):
    for m in (0, 4, *ROWS):
        check(m, n, dtype, shift=n % 3, seed=m)


@pytest.mark.parametrize("n", TAILS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_whole_numbers_give_the_oracle_exactly(dtype, n):
    for m in (0, 1, 5, 32):
        w, v, c = inputs(m, n, dtype, exact=True)
        expected_w, expected = panel_reference.project_(w, v, c)
        products = ops.project_(w, v, c)
        assert torch.equal(w.double(), expected_w)
        assert_same_bits(products, expected)


@given(
    m=st.integers(0, 12),
    n=st.integers(0, 1200),
    shift=st.integers(0, 9),
    dtype=st.sampled_from([F32, F64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(m, n, shift, dtype, seed):
    check(m, n, dtype, shift, seed)


def test_two_passes_leave_nothing_of_an_orthonormal_panel():
    # What Lanczos uses it for: the second pass takes out what rounding left of the first.
    v = torch.linalg.qr(random_panel(5000, 20, F64))[0].T.contiguous()
    w = random_panel(1, 5000, F64, seed=1)[0]
    products = ops.project_(w, v, v @ w)
    assert (products[:-1].abs() < 1e-12).all()
    products = ops.project_(w, v, products[:-1].clone())
    assert (products[:-1].abs() < 1e-14).all()
    assert math.isclose(float(products[-1]), float(w @ w), rel_tol=1e-13)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        w, v, c = inputs(3, LARGE, F32)
        with threads(count):
            results.append((ops.project_(w, v, c), w))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_products(value):
    w, v, c = inputs(3, 600, F32)
    w[599] = value
    assert not ops.project_(w, v, c).isfinite().any()


def test_the_version_of_what_is_written_counts():
    w, v, c = inputs(2, 8, F32)
    before = w._version, v._version
    ops.project_(w, v, c)
    assert w._version > before[0] and v._version == before[1]


WHOLE = torch.zeros(4, 40)
WRONG = {
    "w dtype": ({"w": torch.zeros(40, dtype=BF16)}, "w: expected float32 or float64"),
    "w dim": ({"w": torch.zeros(1, 40)}, "w: expected a contiguous 1-D"),
    "v dtype": ({"v": torch.zeros(3, 40, dtype=F64)}, "v: dtype"),
    "v dim": ({"v": torch.zeros(40)}, "v: expected a contiguous 2-D"),
    "v strided": ({"v": torch.zeros(40, 3).T}, "v: expected a contiguous 2-D"),
    "v rows": ({"v": torch.zeros(129, 40)}, "v: 129 rows, expected at most 128"),
    "v length": ({"v": torch.zeros(3, 41)}, "v: rows of 41 elements, but w has rows of 40"),
    "coefficients size": ({"coefficients": torch.zeros(4, dtype=F64)}, "coefficients: expected 3"),
    "coefficients dtype": ({"coefficients": torch.zeros(3)}, "coefficients: expected"),
    "w in v": ({"w": WHOLE[2], "v": WHOLE[:3]}, "w: shares memory with v"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "w": torch.ones(40),
        "v": torch.ones(3, 40),
        "coefficients": torch.ones(3, dtype=F64),
    }
    ops.project_(**{**arguments, "w": torch.ones(40)})
    arguments |= replaced
    before = arguments["w"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.project_(**arguments)
    assert_same_bits(arguments["w"], before)
