"""displace_, difference_, gram, combine_ and project_: infinities, gates, what they are for."""

import math

import pytest
import torch

from lyapcuda import ops
from op_inputs import BF16, DTYPES, F32, F64, GUARD, Inputs, assert_same_bits, number
from op_table import TABLE

pytestmark = pytest.mark.usefixtures("backend")

DISPLACE, DIFFERENCE, COMBINE = (TABLE[op] for op in ("displace_", "difference_", "combine_"))


def panel(rows, n, dtype=F32, seed=0):
    return Inputs([n], rows, dtype, dtype, gap=0, seed=seed).panel()


# --- products of the Hessian ---------------------------------------------------------------------


def test_what_was_realised_is_the_step_but_for_rounding():
    for buffer, storage in DTYPES:
        a = DISPLACE.draw(DISPLACE.inputs([4097, 33], 1, buffer, storage), step=0.1)
        realised, square = DISPLACE.call(a).tolist()
        rounding = max(2 * torch.finfo(storage).eps, 1e-14)  # of θ + step·v, of the sums
        assert math.isclose(realised / square / 0.1, 1.0, rel_tol=rounding)


def test_a_step_below_the_parameters_precision_realises_nothing():
    a = DISPLACE.draw(DISPLACE.inputs([100], 1, F32, BF16), step=1e-6)
    a["theta"][0].fill_(1.0)
    assert DISPLACE.call(a)[0] == 0.0


@pytest.mark.parametrize("step", [math.inf, math.nan])
def test_a_step_that_is_not_finite_shows_in_the_sums(step):
    assert not DISPLACE.call(DISPLACE.draw(DISPLACE.inputs([33]), step=step)).isfinite()[0]


def test_out_is_not_read():
    inputs = DIFFERENCE.inputs([1003])
    a = DIFFERENCE.draw(inputs)
    a["out"].fill_(math.nan)
    DIFFERENCE.call(a)
    assert torch.equal(a["out"].isfinite(), inputs.used)


# --- panels as matrices --------------------------------------------------------------------------


def test_the_first_rows_of_a_panel_are_another_panel():
    a = panel(5, 4097)
    assert_same_bits(ops.gram(a[:3], a), ops.gram(a[:3].clone(), a.clone()))
    assert_same_bits(ops.gram(a[1:4], a[:3]), ops.gram(a[1:4].clone(), a[:3].clone()))


def test_a_panel_with_a_copy_is_as_with_itself(backend):
    """To the bit on the CPU; a kernel of another shape adds up other pairs."""
    for k in (1, 5, 33):
        a = panel(k, 4097, seed=k)
        with_itself, with_copy = ops.gram(a, a), ops.gram(a, a.clone())
        if backend == "cpu":
            assert_same_bits(with_itself, with_copy)
        size = a.double().norm(dim=1)
        assert ((with_itself - with_copy).abs() <= 1e-14 * size[:, None] * size).all()


def test_products_of_floats_are_not_rounded_to_float():
    a = torch.full((1, 1000), 1e30)
    assert math.isclose(float(ops.gram(a, a)), 1000 * float(a[0, 0]) ** 2, rel_tol=1e-13)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 256, 4096, 4100])
def test_what_is_not_finite_reaches_its_own_rows_and_columns_only(value, at):
    a = panel(6, 4101)
    a[2, at] = value
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[2], expected[:, 2] = False, False
    assert torch.equal(ops.gram(a, a).isfinite(), expected)


def test_a_closed_gate_reads_nothing():
    a = torch.full((3, 100), math.nan)
    assert_same_bits(ops.gram(a, a, gate=number(0.0)), torch.zeros(3, 3, dtype=F64))
    assert ops.gram(a, a, gate=number(0.5)).isnan().all()
    out = torch.full((3, 100), GUARD)
    ops.combine_(out, a, torch.eye(3, dtype=F64), gate=number(0.0))
    assert (out == GUARD).all()


def test_what_is_not_finite_stays_in_its_column():
    a = COMBINE.draw(COMBINE.inputs([100], 3), columns=2)
    a["panel"][1, 17] = math.nan
    COMBINE.call(a)
    assert a["out"][:, 17].isnan().all() and int(a["out"].isnan().sum()) == 2


def test_two_passes_leave_nothing_of_an_orthonormal_panel():
    # What Lanczos uses it for: the second pass takes out what rounding left of the first.
    v = torch.linalg.qr(panel(5000, 20, F64))[0].T.contiguous()
    w = panel(1, 5000, F64, seed=1)[0]
    products = ops.project_(w, v, v @ w)
    assert (products[:-1].abs() < 1e-12).all()
    products = ops.project_(w, v, products[:-1].clone())
    assert (products[:-1].abs() < 1e-14).all()
    assert math.isclose(float(products[-1]), float(w @ w), rel_tol=1e-13)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_products(value):
    w, v, c = panel(1, 600)[0], panel(3, 600, seed=1), torch.ones(3, dtype=F64)
    w[599] = value
    assert not ops.project_(w, v, c).isfinite().any()
