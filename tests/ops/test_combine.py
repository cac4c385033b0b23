"""combine_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import F16, F32, F64, GUARD, assert_same_bits, eps, surroundings, threads
from panel_cases import LARGE, ROWS, TAILS, combined_bits, guarded_panel, random_panel


def random_matrix(ki, ko, seed=0):
    return torch.randn(ki, ko, generator=torch.Generator().manual_seed(seed), dtype=F64)


def check(ki, ko, n, dtype, shift=0, seed=0):
    panel, matrix = random_panel(ki, n, dtype, shift, seed), random_matrix(ki, ko, seed)
    out = guarded_panel(ko, n, dtype, shift)
    before, around = panel.clone(), surroundings(out)
    ops.combine_(out, panel, matrix)
    assert_same_bits(out, combined_bits(panel, matrix))
    assert_same_bits(panel, before)
    assert torch.equal(surroundings(out), around)
    expected = panel_reference.combine_(out, panel, matrix)
    size = matrix.abs().T @ panel.double().abs()  # ki products and sums, half an epsilon each
    assert ((out.double() - expected).abs() <= (ki + 2) * eps(dtype) * size + 1e-300).all()


@pytest.mark.parametrize("n", TAILS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_every_size_to_the_bit(dtype, n):
    for ki, ko in itertools.product(ROWS, (1, 3, 4, 5, 14, 128)):
        if ki * ko * n < 1 << 24:
            check(ki, ko, n, dtype, shift=n % 3, seed=ki)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_long_panel_to_the_bit(dtype):
    check(3, 3, LARGE, dtype)


@given(
    ki=st.integers(1, 70),
    ko=st.integers(1, 20),
    n=st.integers(0, 600),
    shift=st.integers(0, 9),
    dtype=st.sampled_from([F32, F64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_anything_to_the_bit(ki, ko, n, shift, dtype, seed):
    check(ki, ko, n, dtype, shift, seed)


@pytest.mark.parametrize("n", TAILS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_in_place_with_no_more_rows_is_the_same_to_the_bit(dtype, n):
    for ki, ko in ((1, 1), (3, 2), (5, 5), (32, 32), (128, 17), (128, 128)):
        panel, matrix = random_panel(ki, n, dtype, shift=1), random_matrix(ki, ko)
        expected, rest = combined_bits(panel, matrix), panel[ko:].clone()
        around = surroundings(panel)
        ops.combine_(panel[:ko], panel, matrix)
        assert_same_bits(panel[:ko].contiguous(), expected)
        assert_same_bits(panel[ko:].contiguous(), rest)
        assert torch.equal(surroundings(panel), around)


def test_in_place_over_many_blocks_and_threads():
    for count in (1, 2):
        panel, matrix = random_panel(4, LARGE, F32), random_matrix(4, 4)
        expected = combined_bits(panel, matrix)
        with threads(count):
            ops.combine_(panel, panel, matrix)
        assert_same_bits(panel, expected)


def test_what_is_not_finite_stays_in_its_column():
    panel, matrix = random_panel(3, 100, F32), random_matrix(3, 2)
    panel[1, 17] = math.nan
    out = torch.empty(2, 100)
    ops.combine_(out, panel, matrix)
    assert out[:, 17].isnan().all() and int(out.isnan().sum()) == 2


def test_a_closed_gate_leaves_everything():
    panel, matrix = random_panel(3, 100, F32), random_matrix(3, 3)
    out, before = guarded_panel(3, 100, F32), panel.clone()
    closed = torch.zeros(1, dtype=F64)
    ops.combine_(out, panel, matrix, gate=closed)
    ops.combine_(panel, panel, matrix, gate=closed)
    assert (out == GUARD).all()
    assert_same_bits(panel, before)
    ops.combine_(out, panel, matrix, gate=torch.full((1,), math.nan, dtype=F64))
    assert_same_bits(out, combined_bits(panel, matrix))


def test_the_version_of_what_is_written_counts():
    out, panel = torch.zeros(2, 8), torch.ones(2, 8)
    before = out._version, panel._version
    ops.combine_(out, panel, torch.eye(2, dtype=F64))
    assert out._version > before[0] and panel._version == before[1]


PANEL = torch.zeros(6, 40)
EYE = torch.eye(3, dtype=F64)
WRONG = {
    "panel dtype": ({"panel": torch.zeros(3, 40, dtype=F16)}, "panel: expected float32"),
    "panel dim": ({"panel": torch.zeros(40)}, "panel: expected a contiguous 2-D"),
    "panel strided": ({"panel": torch.zeros(40, 3).T}, "panel: expected a contiguous 2-D"),
    "panel rows": ({"panel": torch.zeros(129, 40)}, "panel: 129 rows"),
    "out rows": ({"out": torch.zeros(129, 40)}, "out: 129 rows"),
    "out dtype": ({"out": torch.zeros(3, 40, dtype=F64)}, "out: dtype"),
    "out length": ({"out": torch.zeros(3, 39)}, "out: rows of 39 elements, but panel has"),
    "matrix dtype": ({"matrix": torch.eye(3)}, "matrix: expected a contiguous float64"),
    "matrix shape": ({"matrix": torch.zeros(4, 3, dtype=F64)}, "matrix: expected 3 x 3"),
    "matrix dim": ({"matrix": torch.zeros(9, dtype=F64)}, "matrix: expected 3 x 3"),
    "matrix strided": ({"matrix": torch.zeros(3, 6, dtype=F64)[:, ::2]}, "matrix: expected"),
    "gate size": ({"gate": torch.zeros(0, dtype=F64)}, "gate: expected 1 elements"),
    "out overlaps": ({"out": PANEL[1:4], "panel": PANEL[:3]}, "out: shares memory with panel"),
    "out shifted": ({"out": PANEL[:3], "panel": PANEL[2:5]}, "out: shares memory with panel"),
    "out longer": (
        {"out": PANEL[:4], "panel": PANEL[:3], "matrix": torch.zeros(3, 4, dtype=F64)},
        "out: shares memory with panel.*4 rows, panel has 3",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {"out": torch.zeros(3, 40), "panel": torch.ones(3, 40), "matrix": EYE}
    ops.combine_(**{**arguments, "out": torch.zeros(3, 40)})
    arguments |= replaced
    before = arguments["out"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.combine_(**arguments)
    assert_same_bits(arguments["out"], before)
