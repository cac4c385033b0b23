"""gram against its fp64 oracle, to the last bit where whole numbers allow it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import BF16, F32, F64, assert_same_bits, threads
from panel_cases import LARGE, ROWS, TAILS, close_sums, random_panel


@pytest.mark.parametrize("n", TAILS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_size_exactly(dtype, n):
    for ka, kb in itertools.product(ROWS, (1, 2, 3, 4, 5, 128)):
        a = random_panel(ka, n, dtype, n % 3, seed=ka, exact=True)
        b = random_panel(kb, n, dtype, (n + 1) % 3, seed=1000 + kb, exact=True)
        before = a.clone(), b.clone()
        assert torch.equal(ops.gram(a, b), panel_reference.gram(a, b))
        for now, then in zip((a, b), before, strict=True):
            assert_same_bits(now, then)


@pytest.mark.parametrize("n", [*TAILS, LARGE])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_panel_with_itself_is_symmetric_to_the_bit_and_the_same_as_with_a_copy(dtype, n):
    for k in ROWS if n < LARGE else (1, 5):
        a = random_panel(k, n, dtype, shift=1, seed=k)
        result = ops.gram(a, a)
        assert_same_bits(result, result.T.contiguous())
        assert_same_bits(result, ops.gram(a, a.clone()))
        close_sums(result, a, a)


def test_the_first_rows_of_a_panel_are_another_panel():
    a = random_panel(5, 4097, F32)
    assert_same_bits(ops.gram(a[:3], a), ops.gram(a[:3].clone(), a.clone()))
    assert_same_bits(ops.gram(a[1:4], a[:3]), ops.gram(a[1:4].clone(), a[:3].clone()))


@given(
    ka=st.integers(1, 20),
    kb=st.integers(1, 20),
    n=st.integers(0, 600),
    shift=st.integers(0, 9),
    dtype=st.sampled_from([F32, F64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_rounding_of_its_sums(ka, kb, n, shift, dtype, seed):
    a = random_panel(ka, n, dtype, shift, seed)
    b = random_panel(kb, n, dtype, 2 * shift, seed + 1)
    close_sums(ops.gram(a, b), a, b)


def test_products_of_floats_are_not_rounded_to_float():
    a = torch.full((1, 1000), 1e30)
    assert math.isclose(float(ops.gram(a, a)), 1000 * float(a[0, 0]) ** 2, rel_tol=1e-13)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 256, 4096, 4100])
def test_what_is_not_finite_reaches_its_own_rows_and_columns_only(value, at):
    a = random_panel(6, 4101, F32)
    a[2, at] = value
    finite = ops.gram(a, a).isfinite()
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[2], expected[:, 2] = False, False
    assert torch.equal(finite, expected)


def test_a_closed_gate_gives_zeros_and_reads_nothing():
    a = torch.full((3, 100), math.nan)
    closed, opened = torch.zeros(1, dtype=F64), torch.full((1,), 0.5, dtype=F64)
    assert_same_bits(ops.gram(a, a, gate=closed), torch.zeros(3, 3, dtype=F64))
    assert ops.gram(a, a, gate=opened).isnan().all()


def test_empty_rows_give_zeros():
    a = torch.empty(3, 0)
    assert_same_bits(ops.gram(a, a), torch.zeros(3, 3, dtype=F64))


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    a, b = random_panel(7, LARGE, F32), random_panel(5, LARGE, F32, seed=1)
    results = []
    for count in (1, 2, 2):
        with threads(count):
            results.append((ops.gram(a, b), ops.gram(a, a)))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert_same_bits(x, y)


WRONG = {
    "a dtype": ({"a": torch.zeros(3, 40, dtype=BF16)}, "a: expected float32 or float64"),
    "a dim": ({"a": torch.zeros(40)}, "a: expected a contiguous 2-D"),
    "a strided": ({"a": torch.zeros(40, 3).T}, "a: expected a contiguous 2-D"),
    "a rows": ({"a": torch.zeros(129, 40)}, "a: 129 rows, expected 1 to 128"),
    "a empty": ({"a": torch.zeros(0, 40)}, "a: 0 rows"),
    "b rows": ({"b": torch.zeros(129, 40)}, "b: 129 rows"),
    "b dtype": ({"b": torch.zeros(3, 40, dtype=F64)}, "b: dtype"),
    "b length": ({"b": torch.zeros(3, 41)}, "b: rows of 41 elements, but a has rows of 40"),
    "gate dtype": ({"gate": torch.zeros(1)}, "gate: expected"),
    "gate size": ({"gate": torch.zeros(2, dtype=F64)}, "gate: expected 1 elements, got 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    replaced, message = WRONG[wrong]
    arguments = {"a": torch.zeros(3, 40), "b": torch.zeros(2, 40)}
    ops.gram(**arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.gram(**arguments | replaced)
