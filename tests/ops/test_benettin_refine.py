"""benettin_refine_: the second pass where one orthonormalisation leaves too few digits."""

import math

import numpy as np
import pytest
import torch

from benettin_steps import SIZE, N, Step, orthonormal
from lyapcuda import ops
from lyapcuda.ops import reference
from op_inputs import F64, assert_same_bits

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("k", [2, 5, 32])
def test_a_wide_spread_takes_a_second_pass(k, rotate):
    # Growths from 1e-4 to 3: a Gram matrix of condition 1e9.
    curvature = torch.linspace(0, 7, N, dtype=F64)
    curvature[: k - 1] = torch.linspace(1, 7, k - 1, dtype=F64)
    curvature[k - 1] = (1e-4 - 1) / 0.25
    mix = torch.linalg.qr(torch.randn(k, k, dtype=F64, generator=torch.manual_seed(k)))[0]
    carried = SIZE * mix @ torch.eye(k, N, dtype=F64)
    step = Step(k, carried=carried, curvature=curvature, beta=0.25).run(rotate=rotate)
    assert (step["again"], step["pending"]) == (1, 1)
    first = step["transform"].T @ step.d
    gram = first @ first.T
    expected = reference.benettin_refine_(step.state, gram, k)
    ops.benettin_refine_(step.state, gram, k)
    torch.testing.assert_close(step.state, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert (step["again"], step["pending"]) == (0, 1)
    q = step["transform"].T @ first
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-16)
    growth = step["r"].diag() / SIZE
    torch.testing.assert_close(step["exponent"], growth.log(), rtol=0, atol=1e-10)
    if rotate:
        wanted = (1 + 0.25 * step["rayleigh"]).abs().log()
        torch.testing.assert_close(step["exponent"], wanted, rtol=0, atol=1e-7)
    else:
        r = np.linalg.qr(step.d.T.numpy(), mode="r")
        exact = np.log(np.abs(np.diag(r)) / SIZE)
        np.testing.assert_allclose(step["exponent"].numpy(), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5, 32])
def test_any_second_gram_matrix_gives_the_factor_that_was_left(k):
    # Far from the identity, so that every entry of both factors counts.
    step = Step(k, noise=0.3).run(rotate=False)
    ops.state_field(step.state, k, "again").fill_(1.0)
    first, exponent = step["r"], step["exponent"]
    skew = torch.randn(k, k, dtype=F64, generator=torch.manual_seed(k)) / k + torch.eye(k)
    panel = skew @ orthonormal(k)
    ops.benettin_refine_(step.state, panel @ panel.T, k)
    second = torch.linalg.cholesky(panel @ panel.T / SIZE**2).T
    torch.testing.assert_close(step["r"], second @ first, rtol=0, atol=1e-12)
    assert torch.equal(step["r"], step["r"].triu())
    torch.testing.assert_close(step["exponent"], exponent + second.diag().log(), rtol=0, atol=1e-12)
    q = step["transform"].T @ panel
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-13)


def test_no_second_pass_where_none_is_asked_for():
    step = Step(3).run()
    before = step.state.clone()
    ops.benettin_refine_(step.state, torch.full((3, 3), NAN, dtype=F64), 3)
    assert_same_bits(step.state, before)


@pytest.mark.parametrize("bad", [NAN, INF, 0.0, -1.0])
def test_a_second_pass_that_fails_keeps_the_separations(bad):
    step = Step(3).run()
    ops.state_field(step.state, 3, "again").fill_(1.0)
    before = step.state.clone()
    gram = SIZE**2 * torch.eye(3, dtype=F64)
    gram[1, 1] = bad
    ops.benettin_refine_(step.state, gram, 3)
    assert (step["again"], step["pending"]) == (0, 0)
    for name in ("again", "pending"):
        ops.state_field(before, 3, name).fill_(0.0)
    if math.isfinite(bad):  # the second row is within the span of the first: another is asked for
        ops.state_field(before, 3, "reseed").fill_(2.0)
        ops.state_field(before, 3, "reseeds").fill_(1.0)
    assert_same_bits(step.state, before)
