"""benettin_ against LAPACK and its oracle: Ritz values, exponents, transform, what is refused."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benettin_steps import LOSSES, SIZE, N, Step, check, orthonormal, random_step, scalar
from lyapcuda import ops
from lyapcuda.ops import reference
from op_inputs import COUNTS, F64, assert_same_bits

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.usefixtures("backend")

# --- against LAPACK and exact Gram-Schmidt --------------------------------------------------------

KINDS = list(itertools.product((1, -1), (0.0, 0.9), (False, True), (True, False)))


def residual_square(step, u, value):
    """‖y_u − λ·m_u‖²/‖m_u‖² from the vectors themselves."""
    left = u @ step.y - value[:, None] * (u @ step.m)
    return left.square().sum(1) / (u @ step.m).square().sum(1)


@pytest.mark.parametrize(("sign", "momentum", "realised", "rotate"), KINDS)
@pytest.mark.parametrize("k", COUNTS)
def test_ritz_values_residuals_and_exponents_are_lapacks(k, sign, momentum, realised, rotate):
    for seed in range(3):
        step = Step(k, seed=seed, sign=sign, momentum=momentum, realised=realised, noise=0.3)
        step.run(rotate=rotate)
        a, b = step.c @ step.y.T, step.c @ step.m.T
        values, u = scipy.linalg.eigh(((a + a.T) / 2).numpy(), ((b + b.T) / 2).numpy())
        if sign > 0:
            values, u = values[::-1].copy(), u[:, ::-1].copy()
        values, u = torch.from_numpy(values), torch.from_numpy(u)
        torch.testing.assert_close(step["rayleigh"], values, rtol=0, atol=1e-12)
        square = residual_square(step, u.T, values)
        torch.testing.assert_close(step["residual"] ** 2, square, rtol=1e-9, atol=1e-11)

        v = (u / u.norm(dim=0)).T if rotate else torch.eye(k, dtype=F64)
        r = np.linalg.qr((v @ step.d).T.numpy(), mode="r")
        growth = np.abs(np.diag(r)) / (v @ step.c).norm(dim=1).numpy()
        np.testing.assert_allclose(step["exponent"].numpy(), np.log(growth), rtol=0, atol=1e-10)
        if not rotate:  # the order and signs of the columns are then those of the rows
            r = r * np.sign(np.diag(r))[:, None]
            np.testing.assert_allclose(step["r"].numpy(), r, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("sign", "momentum", "realised", "rotate"), KINDS)
@pytest.mark.parametrize("k", COUNTS)
def test_the_transform_makes_d_orthonormal_with_the_norm_asked_for(
    k, sign, momentum, realised, rotate
):
    step = Step(k, sign=sign, momentum=momentum, realised=realised, noise=0.3)
    step.run(rotate=rotate)
    assert step["pending"] == 1 and step["again"] == 0
    q = step["transform"].T @ step.d
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-14)
    r = step["r"]
    assert torch.equal(r, r.triu()) and (r.diag() > 0).all()
    if not rotate:  # D = Q·R, on the other side of θ
        torch.testing.assert_close(-(q.T / SIZE) @ r, step.d.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rotate", [True, False])
def test_growth_is_measured_from_the_norm_that_a_separation_had(rotate):
    lengths = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)
    skew = torch.tril(torch.full((4, 4), 0.3, dtype=F64), -1) + lengths.diag()
    step = Step(4, carried=skew @ orthonormal(4), noise=0.3).run(rotate=rotate)
    a = step.gram[:4, 4:]
    _, u = reference.ritz((a + a.T) / 2, step.gram[:4, :4], 1)
    v = (u / u.norm(dim=0)).T if rotate else torch.eye(4, dtype=F64)
    r = np.linalg.qr((v @ step.d).T.numpy(), mode="r")
    growth = np.abs(np.diag(r)) / (v @ step.c).norm(dim=1).numpy()
    np.testing.assert_allclose(step["exponent"].numpy(), np.log(growth), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_rotated_separations_are_the_ritz_vectors_stepped(sign):
    # In an invariant subspace every Ritz vector is an eigenvector: d points where it does.
    curvature = torch.linspace(-3, 7, N, dtype=F64)
    mix = torch.linalg.qr(torch.randn(5, 5, dtype=F64, generator=torch.manual_seed(0)))[0]
    places = [0, 40, 90, 120, N - 1]
    carried = torch.zeros(5, N, dtype=F64)
    carried[:, places] = mix * SIZE
    step = Step(5, carried=carried, curvature=curvature, sign=sign).run()
    wanted = curvature[places].sort(descending=sign > 0).values
    torch.testing.assert_close(step["rayleigh"], wanted, rtol=0, atol=1e-12)
    assert (step["residual"] < 1e-6).all()
    growth = (1 + step.rate * wanted).abs()
    torch.testing.assert_close(step["exponent"], growth.log(), rtol=0, atol=1e-10)
    q = step["transform"].T @ step.d
    torch.testing.assert_close(q * curvature, wanted[:, None] * q, rtol=0, atol=1e-12)


def test_the_columns_keep_the_direction_they_had():
    # A panel that is already of Ritz vectors isn't turned round: the transform is diagonal.
    step = Step(6, carried=SIZE * torch.eye(6, N, dtype=F64).flip(0)).run(alternate=False)
    turned = step["transform"].abs() > 1e-12
    assert torch.equal(turned.sum(0), torch.ones(6, dtype=torch.int64))
    assert (step["transform"][turned] > 0).all()


def test_a_step_takes_the_other_side_only_where_asked():
    plain, other = Step(4).run(alternate=False), Step(4).run()
    assert_same_bits(plain["transform"], -other["transform"])


# --- against the oracle ---------------------------------------------------------------------------


@given(
    k=st.sampled_from([1, 2, 3, 5, 14]),
    rng=st.randoms(use_true_random=False),
    estimate=st.sampled_from(sorted(ops.ESTIMATES.values())),
    control=st.booleans(),
    alternate=st.booleans(),
    rotate=st.booleans(),
    ema=st.sampled_from([0.0, 0.9]),
)
@settings(max_examples=200, deadline=None)
def test_any_step_is_the_oracles(k, rng, estimate, control, alternate, rotate, ema):
    check(
        random_step(rng, k),
        estimate=estimate,
        control=control,
        alternate=alternate,
        rotate=rotate,
        ema=ema,
    )


@pytest.mark.parametrize("options", KINDS)
def test_the_largest_panel_is_the_oracles(options):
    sign, momentum, realised, rotate = options
    step = Step(32, sign=sign, momentum=momentum, realised=realised, noise=0.3)
    check(step, rotate=rotate, estimate=1)


@pytest.mark.parametrize("shape", [(0,), (), (2, 3)])
def test_any_number_of_losses_in_any_shape(shape):
    assert Step(2).run(torch.zeros(shape, dtype=F64))["accepted"] == 1


# --- what does not count --------------------------------------------------------------------------

COUNTERS = ("accepted", "pending", "again", "skipped")


def check_refused(step, losses=LOSSES, lost=None, **options):
    before = step.state.clone()
    step.run(losses, **options)
    assert (step["accepted"], step["pending"], step["again"]) == (0, 0, 0)
    assert step["skipped"] == scalar(before, step.k, "skipped") + 1
    asked = (0.0, 0.0) if lost is None else (lost + 1.0, 1.0)
    assert (step["reseed"], step["reseeds"]) == asked
    for name in (*COUNTERS, "reseed", "reseeds"):
        value = scalar(before, step.k, name)
        ops.state_field(step.state, step.k, name).fill_(value)
    assert_same_bits(step.state, before)


def started(k, **options):
    """A step whose state has every field filled."""
    step = Step(k, **options).run()
    ops.state_field(step.state, k, "again").fill_(1.0)
    return step


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_anything_not_finite_changes_nothing_but_the_counts(bad):
    for options in ({}, {"realised": True}, {"momentum": 0.5}):
        rows = started(3, **options).gram.shape[0]
        for at in itertools.product(range(0, rows, 2), repeat=2):
            step = started(3, **options)
            step.gram[at] = bad
            check_refused(step)
    for at in (0, 1):
        losses = LOSSES.clone()
        losses[at] = bad
        check_refused(started(3), losses)


@pytest.mark.parametrize("realised", [False, True])
def test_a_panel_that_is_not_of_full_rank_only_counts_and_asks_for_another_row(realised):
    whole = started(3, realised=realised)
    for block in (0, 2 if realised else 0):
        for value in (0.0, -1.0):
            step = started(3, realised=realised)
            step.gram[1, block * 3 + 1] = step.gram[block * 3 + 1, 1] = value
            expected = reference.benettin_(step.state, step.gram, LOSSES, 3, **step.options())
            check_refused(step, lost=1)
            assert scalar(expected, 3, "reseed") == 2
    assert whole["pending"] == 1
    twice = orthonormal(3)
    twice[2] = twice[0]
    step = started(3)
    step.gram = Step(3, carried=twice).gram
    check_refused(step, lost=2)


def test_values_that_leave_the_range_are_refused():
    step = started(2)
    step.gram[2:, 2:] *= 1e308  # uᵀ·YY·u has no double
    check_refused(step)


# --- the copies met, or came close ----------------------------------------------------------------


@pytest.mark.parametrize("control", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 4])
def test_copies_that_met_keep_the_separations(k, control, rotate, momentum):
    curvature, row = torch.linspace(-3, 7, N, dtype=F64), min(2, k - 1)
    curvature[row] = -1 / 0.25  # 1 + βh = 0 along that row
    before = Step(k).run()
    step = Step(k, carried=SIZE * torch.eye(k, N, dtype=F64), curvature=curvature, beta=0.25)
    if momentum:  # with the Gram matrix of D in it, rows of which vanish
        stack = torch.cat([step.c, step.y, step.d])
        step.gram, step.momentum = stack @ stack.T, momentum
    for name in ("r", "transform", "exponent"):
        ops.state_field(step.state, k, name).copy_(torch.as_tensor(before[name]))
    step.run(control=control, rotate=rotate)
    assert (step["pending"], step["again"], step["accepted"], step["steps"]) == (0, 0, 1, 1)
    assert step["beta"] == (0.125 if control else 0.25)
    # Under a rate that stays they would meet again: that row is to be another.
    assert (step["reseed"], step["reseeds"]) == ((0, 0) if control else (row + 1, 1))
    for name in ("r", "transform", "exponent"):
        assert_same_bits(step[name], before[name])
    expected = curvature[:k].sort(descending=True).values
    torch.testing.assert_close(step["rayleigh"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(step["h"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lost", ["no separation", "copies that met", "one that was turned round"])
@pytest.mark.parametrize("estimate", [0, 1, 2, 3])
def test_one_separation_that_is_lost_is_to_be_made_anew(lost, estimate):
    met = lost == "copies that met"
    curvature = torch.full((N,), -2.0 if met else 2.0, dtype=F64)
    turned = lost == "one that was turned round"
    step = Step(1, curvature=curvature, beta=0.5, realised=turned, steps=3.0, reseeds=1.0)
    if lost == "no separation":
        step.gram[0, 0] = 0.0
    elif turned:
        step.gram[0, 2] = step.gram[2, 0] = 0.0
    step.run(estimate=estimate, control=False)
    assert (step["reseed"], step["reseeds"], step["accepted"]) == (1, 2, float(met))
    assert (step["pending"], step["beta"], float(step["transform"])) == (0, 0.5, 1.0)
    # The next step that counts, and one that isn't finite, ask for nothing.
    for bad in (1.0, NAN):
        after = Step(1, curvature=curvature.abs(), beta=0.5)
        after.state.copy_(step.state)
        after.run(torch.full((1,), bad, dtype=F64), estimate=estimate, control=False)
        assert (after["reseed"], after["reseeds"]) == (0, 2)
