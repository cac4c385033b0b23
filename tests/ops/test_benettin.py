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
from lyapcuda.ops import panel_reference
from ops_cases import F64, assert_same_bits, fields_of
from panel_cases import COUNTS

NAN, INF = math.nan, math.inf

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
    _, u = panel_reference.ritz((a + a.T) / 2, step.gram[:4, :4], 1)
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
    estimate=st.sampled_from([0, 1, 2, 3]),
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


def sums_of(step):
    c, m, y, d = (x[0] for x in (step.c, step.m, step.y, step.d))
    pairs = ((d, d), (m, m), (m, y), (y, y), (c, m), (c, y))
    return torch.stack([(a * b).sum() for a, b in pairs])


@pytest.mark.parametrize("realised", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("estimate", [0, 1, 2, 3])
def test_one_separation_is_exponents(sign, momentum, realised, estimate):
    options = {"sign": sign, "estimate": estimate, "momentum": momentum, "ema": 0.5}
    single = ops.new_state("cpu", perturbation=SIZE, scale=1.0, beta=0.17)
    panel = ops.new_panel_state("cpu", 1, perturbation=SIZE, beta=0.17)
    for seed in range(3):
        beta = scalar(panel, 1, "beta")
        step = Step(1, seed=seed, beta=beta, sign=sign, momentum=momentum, realised=realised)
        ops.benettin_(panel, step.gram, LOSSES, 1, realised=realised, **options)
        ops.exponent_(single, sums_of(step), LOSSES, **options)
        known = fields_of(single)
        for name in ("rayleigh", "residual", "center", "width", "h", "h_ema", "beta", "bound"):
            # exponent_ measures the growth from ‖moved‖, this from ‖carried‖: λ then differs by up
            # to 1e-4, and h, which may be small itself, by that over β.
            away = (
                1e-4 * math.e / abs(beta) if realised and estimate and name.startswith("h") else 0.0
            )
            tolerance = 1e-3 if realised and estimate else 1e-11
            assert math.isclose(
                scalar(panel, 1, name), known[name], rel_tol=tolerance, abs_tol=away
            ), name
        assert math.isclose(
            scalar(panel, 1, "exponent"), known["exponent"], abs_tol=1e-4 * realised + 1e-12
        )
        assert scalar(panel, 1, "guard") == pytest.approx(known["guard"], rel=1e-11)
        if not realised:
            assert math.isclose(scalar(panel, 1, "transform"), known["scale"], rel_tol=1e-12)


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
        ops.panel_field(step.state, step.k, name).fill_(value)
    assert_same_bits(step.state, before)


def started(k, **options):
    """A step whose state has every field filled."""
    step = Step(k, **options).run()
    ops.panel_field(step.state, k, "again").fill_(1.0)
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
            expected = panel_reference.benettin_(step.state, step.gram, LOSSES, 3, **step.options())
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
def test_copies_that_met_keep_the_separations(control, rotate, momentum):
    curvature = torch.linspace(-3, 7, N, dtype=F64)
    curvature[2] = -1 / 0.25  # 1 + βh = 0 along the third row
    before = Step(4).run()
    step = Step(4, carried=SIZE * torch.eye(4, N, dtype=F64), curvature=curvature, beta=0.25)
    if momentum:  # with the Gram matrix of D in it, rows of which vanish
        stack = torch.cat([step.c, step.y, step.d])
        step.gram, step.momentum = stack @ stack.T, momentum
    for name in ("r", "transform", "exponent"):
        ops.panel_field(step.state, 4, name).copy_(before[name])
    step.run(control=control, rotate=rotate)
    assert (step["pending"], step["again"], step["accepted"], step["steps"]) == (0, 0, 1, 1)
    assert step["beta"] == (0.125 if control else 0.25)
    # Under a rate that stays they would meet again: the third row is to be another.
    assert (step["reseed"], step["reseeds"]) == ((0, 0) if control else (3, 1))
    for name in ("r", "transform", "exponent"):
        assert_same_bits(step[name], before[name])
    expected = curvature[:4].sort(descending=True).values
    torch.testing.assert_close(step["rayleigh"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(step["h"], expected, rtol=0, atol=1e-12)


# --- wrong arguments ------------------------------------------------------------------------------


def test_the_version_of_what_is_written_counts():
    step = Step(2)
    before = step.state._version
    step.run()
    middle = step.state._version
    ops.benettin_refine_(step.state, step.gram[:2, :2].contiguous(), 2)
    assert before < middle < step.state._version


WRONG = {
    "k small": ({"k": 0}, "k: expected 1 to 32, got 0"),
    "k large": ({"k": 33}, "k: expected 1 to 32, got 33"),
    "k other": ({"k": 2}, "state: expected 33 elements, got 50"),
    "state dtype": ({"state": torch.zeros(50)}, "state: expected a contiguous float64"),
    "gram size": ({"gram": torch.eye(9, dtype=F64)}, "gram: expected 6 x 6 elements, got 81"),
    "gram dtype": ({"gram": torch.eye(6)}, "gram: expected a contiguous float64"),
    "gram realised": ({"realised": True}, "gram: expected 9 x 9"),
    "gram momentum": ({"momentum": 0.5}, "gram: expected 9 x 9"),
    "gram dim": ({"gram": torch.zeros(36, dtype=F64)}, "gram: expected 6 x 6"),
    "losses dtype": ({"losses": torch.zeros(2)}, "losses: expected a contiguous float64"),
    "sign": ({"sign": 0}, "sign: expected 1"),
    "estimate": ({"estimate": -1}, "estimate: expected 0 to 3, got -1"),
    "momentum": ({"momentum": 1.0}, "momentum: expected"),
    "momentum negative": ({"momentum": -0.1}, "momentum: expected"),
    "ema": ({"ema": 1.5}, "ema: expected"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    step = Step(3)
    arguments = {"state": step.state, "gram": step.gram, "losses": LOSSES, "k": 3} | replaced
    before = arguments["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.benettin_(**arguments)
    assert_same_bits(arguments["state"], before)
