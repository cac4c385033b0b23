"""benettin_: β, the curvatures and their error bars, and spectra that are hard to take apart."""

import math

import pytest
import torch

from benettin_steps import LOSSES, SIZE, N, Step, orthonormal, scalar
from lyapcuda import _C, ops
from lyapcuda.ops import reference
from op_inputs import COUNTS, F64, assert_same_bits

pytestmark = pytest.mark.usefixtures("backend")

# --- β, h and the error bar -----------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 4])
def test_the_first_step_sets_the_rate_and_tells_the_growth_at_it(k, sign):
    step = Step(k, beta=0.0, sign=sign, noise=0.3).run(estimate=1)
    value, residual = step["rayleigh"].abs(), step["residual"]
    seen = torch.hypot(value, residual) if sign > 0 else value + residual
    largest = float(seen.max())
    assert math.isclose(step["beta"], (math.e - 1) / largest, rel_tol=1e-10)
    assert math.isclose(step["bound"], largest, rel_tol=1e-10)
    assert (step["pending"], step["again"]) == (1, 0)
    rate = sign * float(step["beta"])
    along = step["rayleigh"] / torch.hypot(step["rayleigh"], residual)  # of y, by its own length
    secant = torch.hypot(step["rayleigh"], residual)
    growth = (1 + 2 * rate * secant * along + (rate * secant) ** 2).sqrt()
    torch.testing.assert_close(step["exponent"], growth.log(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step["h"], (growth - 1) / rate, rtol=1e-9, atol=1e-12)
    q = step["transform"].T @ step.c  # D = C
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("estimate", ops.ESTIMATES.values())
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_rate_of_zero_falls_back_on_the_quotient(estimate, momentum):
    curvature = torch.full((N,), 3.0, dtype=F64)
    step = Step(1, curvature=curvature, beta=0.0).run(estimate=estimate, control=False)
    assert math.isclose(step["h"], 3.0, rel_tol=1e-12) and step["h"] == step["center"]
    assert math.isnan(step["exponent"])


def eigen_step(state, h, sign=1, **options):
    """A step of one separation that is an eigenvector of h."""
    curvature = torch.full((N,), h, dtype=F64)
    step = Step(1, carried=SIZE * torch.eye(1, N, dtype=F64), curvature=curvature)
    ops.benettin_(state, step.gram, LOSSES, 1, sign=sign, **options)
    return {name: scalar(state, 1, name) for name in ops.state_fields(1)}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_guard_remembers_the_unwanted_end_and_an_ascent_forgets_the_rest(sign):
    state = ops.new_state("cpu", perturbation=SIZE, beta=0.0)
    after = eigen_step(state, sign * 2.0, sign)  # along the wanted end: nothing to guard
    assert after["guard"] == 0.0 and math.isclose(after["beta"], (math.e - 1) / 2, rel_tol=1e-12)
    after = eigen_step(state, -sign * 5.0, sign)
    assert math.isclose(after["guard"], 5.0, rel_tol=1e-12)
    after = eigen_step(state, sign * 8.0, sign)
    assert math.isclose(after["beta"], (math.e - 1) / 8, rel_tol=1e-12)
    for _ in range(200):
        after = eigen_step(state, sign * 2.0, sign)
    # An ascent has forgotten all but the guard, a descent nothing.
    kept = 5.0 if sign > 0 else 8.0
    assert math.isclose(after["beta"], (math.e - 1) / kept, rel_tol=1e-12)


@pytest.mark.parametrize("h", [0.0, 1e-320])
def test_a_curvature_whose_inverse_is_no_number_leaves_the_rate(h):
    assert eigen_step(ops.new_state("cpu", perturbation=SIZE, beta=0.7), h)["beta"] == 0.7


@pytest.mark.parametrize("apart, taken", [(1e-6, 1.0), (1e-8, 0.0)])
def test_a_separation_of_nothing_but_rounding_is_not_taken(apart, taken):
    """1 + βh = −apart: ‖d‖²/‖q‖² is 1e-12, or 1e-16, which the sums of d can't resolve."""
    state = ops.new_state("cpu", perturbation=SIZE, beta=0.5)
    after = eigen_step(state, -2.0 * (1 + apart))
    assert (after["pending"], after["accepted"]) == (taken, 1.0)
    assert taken or after["beta"] == 0.25


@pytest.mark.parametrize("estimate", ops.ESTIMATES.values())
def test_a_rate_stays_one_that_float32_holds(estimate):
    state = ops.new_state("cpu", perturbation=SIZE, beta=1e37)
    after = eigen_step(state, 1e-43, estimate=estimate)
    assert after["beta"] == (1e37 if estimate == 2 else 1e38)


def quotient_step(rho, r=1.0, **known):
    """A step of one separation with this Rayleigh quotient and residual."""
    step = Step(1, carried=SIZE * torch.eye(1, N, dtype=F64), beta=0.3, **known)
    step.y = rho * step.c + r * SIZE * torch.eye(2, N, dtype=F64)[1:]
    stack = torch.cat([step.c, step.y])
    step.gram = stack @ stack.T
    return step


#: Of one step alone, r = 1: by ρ, y·y/(q·y), but at most r away; ‖y‖/‖q‖ with the sign of ρ. At
#: ρ = 0 they have no side to lie on. The outer end lies on the wanted side, a full r away until
#: r is below a tenth of ‖y‖/‖q‖.
ONE_STEP = {
    ("schwarz", 1): {2.0: 2.5, -2.0: -2.5, 0.5: 1.5, 0.0: 0.0, 40.0: 40.025},
    ("secant", 1): {2.0: 5**0.5, -2.0: -(5**0.5), 0.5: 1.25**0.5, 0.0: 0.0, 40.0: 1601**0.5},
    ("outer", 1): {2.0: 3.0, -2.0: -1.0, 0.5: 1.5, 0.0: 1.0, 40.0: 40 + 10 / 1601**0.5},
    ("outer", -1): {2.0: 1.0, -2.0: -3.0, 0.5: -0.5, 0.0: -1.0, -40.0: -40 - 10 / 1601**0.5},
}


@pytest.mark.parametrize(("estimate", "sign"), ONE_STEP)
def test_estimates_of_the_step_alone(estimate, sign):
    expected = ONE_STEP[estimate, sign]
    for rho, h in expected.items():
        # The step before: ρ = 2, r = 1.
        known = {"rayleigh": 2.0, "residual": 1.0, "h_ema": 1.0, "sign": sign}
        step = quotient_step(rho, **known).run(estimate=ops.ESTIMATES[estimate], ema=0.5)
        assert float(step["h"]) == float(step["center"]) == pytest.approx(h, rel=1e-14)
        assert float(step["h_ema"]) == pytest.approx((h + 1.0) / 2)
        width = math.hypot(1.0, h - rho) + abs(h - expected[2.0]) / 2
        assert float(step["width"]) == pytest.approx(width)


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("estimate", ["schwarz", "secant", "outer", "rayleigh"])
def test_the_error_follows_from_the_shares_of_the_residual(estimate, refined):
    """ρ = 3, r = 4: ‖y‖/‖q‖ = 5, the share 0.8; before further gradients it was 0.9."""
    known = {"refined": 1.0, "first": 0.9} if refined else {}
    step = quotient_step(3.0, 4.0, **known).run(estimate=ops.ESTIMATES[estimate])
    assert float(step["first"]) == pytest.approx(0.9 if refined else 0.8, rel=1e-14)
    assert step["refined"] == float(refined)  # the caller's, who takes it back
    if estimate == "outer":  # h = 7
        expected = math.hypot(0.005 * 7.0, 4.0)
    elif estimate == "secant":  # h = 5
        expected = 5.0 * math.hypot(0.01, 0.85 * 0.9**1.2 if refined else 0.75 * 0.8)
    else:  # the Schwarz quotient is ρ + r here, 7
        share = 1.7 * (0.8 + 0.05 * 0.9) ** 1.2 if refined else 2.0 * 0.8**1.2
        expected = 7.0 * math.hypot(0.005, share) + (4.0 if estimate == "rayleigh" else 0.0)
    assert float(step["error"]) == pytest.approx(expected, rel=1e-13)


def test_without_a_product_there_is_no_share_and_no_error():
    step = quotient_step(0.0, 0.0).run(estimate=ops.ESTIMATES["secant"])
    assert step["first"] == step["error"] == step["h"] == 0.0


@pytest.mark.parametrize("estimate", ["schwarz", "secant", "outer"])
@pytest.mark.parametrize("factor", [1e-150, 1e150])
def test_estimates_of_any_size(estimate, factor):
    """Squares of them would be zero, or infinite."""
    one, other = (quotient_step(x * 2.0, x) for x in (1.0, factor))
    for step in (one, other):
        step.run(estimate=ops.ESTIMATES[estimate])
    for name in ("h", "width", "error"):
        assert float(other[name]) == pytest.approx(float(one[name]) * factor, rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bound_fades_on_an_ascent_alone(sign):
    step = Step(3, sign=sign, bound=100.0).run()
    kept = 98.0 if sign > 0 else 100.0
    assert step["bound"] == kept
    assert math.isclose(step["beta"], (math.e - 1) / kept, rel_tol=1e-15)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_guard_takes_what_settled_on_the_unwanted_end(sign):
    curvature = torch.zeros(N, dtype=F64)
    curvature[:3] = torch.tensor([2.0, -1.0, -0.5]) * sign
    step = Step(3, carried=SIZE * torch.eye(3, N, dtype=F64), curvature=curvature, sign=sign)
    step.run()
    assert math.isclose(step["guard"], 1.0, rel_tol=1e-12)
    assert math.isclose(step["bound"], 2.0, rel_tol=1e-12)
    # A mixture of both ends, whose residual is as large as its quotient, is no such vector.
    mixed = SIZE * torch.eye(1, N, dtype=F64)
    mixed[0, :2] = SIZE * torch.tensor([0.5, 0.75**0.5], dtype=F64)
    assert Step(1, carried=mixed, curvature=curvature, sign=sign).run()["guard"] == 0.0


def test_without_control_the_rate_stays():
    step = Step(3).run(control=False)
    assert step["beta"] == 0.17 and step["bound"] == 0.0


def test_the_paper_divides_the_rate_by_the_largest_exponent():
    step = Step(3).run(estimate=2)
    assert math.isclose(step["beta"], 0.17 / float(step["exponent"][0]), rel_tol=1e-15)
    torch.testing.assert_close(step["h"], step["exponent"] / 0.17, rtol=1e-15, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_growth_gives_the_curvature_of_every_vector(sign, momentum):
    step = Step(3, sign=sign, momentum=momentum).run(estimate=1)
    for i in range(3):
        rate = 0.17 * sign
        expected = reference.curvature_of_growth(
            float(step["exponent"][i]), rate, momentum, "growth"
        )
        assert math.isclose(float(step["h"][i]), expected, rel_tol=1e-12)


def test_the_paper_mode_converges_to_its_own_value():
    # λ = 1 at β·h = e − 1, and h is read as λ/β: low by e − 1.
    state = ops.new_state("cpu", perturbation=SIZE, beta=1.0)
    for _ in range(60):
        beta = scalar(state, 1, "beta")
        curvature = torch.full((N,), 17.9, dtype=F64)
        step = Step(1, carried=SIZE * torch.eye(1, N, dtype=F64), curvature=curvature, beta=beta)
        ops.benettin_(state, step.gram, LOSSES, 1, estimate=2, alternate=False)
    assert math.isclose(scalar(state, 1, "exponent"), 1.0, rel_tol=1e-6)
    assert math.isclose(scalar(state, 1, "h"), 17.9 / (math.e - 1), rel_tol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("growth", [1e-6, 1e-3, 0.1, 1.0, math.e - 1, 40.0])
def test_the_growth_of_an_eigenvector_gives_its_eigenvalue(sign, momentum, growth):
    # The larger root of μ² − (1 + m + b·h)·μ + m = 0, which p' = m·p + h·q, q' = q + b·p' grow by.
    rate = sign * 0.05
    trace = 1 + momentum + growth
    mu = (trace + math.sqrt(trace * trace - 4 * momentum)) / 2
    exponent = math.log(mu) if momentum else math.log1p(growth)
    measured = _C.curvature_of_growth(exponent, rate, momentum, ops.ESTIMATES["growth"])
    # log and the subtractions leave 1e-15 of a growth of 1 + bh.
    assert math.isclose(measured, growth / rate, rel_tol=1e-13 + 1e-14 / growth)


@pytest.mark.parametrize(("sign", "h"), [(1, -0.4), (-1, 0.4)])
def test_an_eigenvector_that_shrinks_gives_its_eigenvalue(sign, h):
    rate = 0.5 * sign
    measured = _C.curvature_of_growth(math.log1p(rate * h), rate, 0.0, ops.ESTIMATES["growth"])
    assert math.isclose(measured, h, rel_tol=1e-13)


def test_curvatures_of_growth_in_the_papers_terms_and_where_there_is_none():
    growth, paper = ops.ESTIMATES["growth"], ops.ESTIMATES["paper"]
    assert _C.curvature_of_growth(0.5, 0.25, 0.0, paper) == 2.0
    heavy = _C.curvature_of_growth(0.5, -0.25, 0.9, paper)
    assert math.isclose(heavy, -(0.25 + 0.05) / 0.25, rel_tol=1e-15)
    assert not math.isfinite(_C.curvature_of_growth(0.5, 0.0, 0.0, growth))
    assert not math.isfinite(_C.curvature_of_growth(800.0, 1.0, 0.9, growth))


def test_the_average_starts_at_the_first_value():
    state = ops.new_state("cpu", perturbation=SIZE, beta=0.5)
    for h, expected in ((2.0, 2.0), (4.0, 2.2), (4.0, 2.38)):
        after = eigen_step(state, h, ema=0.9, alternate=False)
        assert math.isclose(after["h_ema"], expected, rel_tol=1e-14)


def test_two_sides_are_averaged_and_their_difference_widens_the_bar():
    first = Step(3, noise=0.3, beta=0.05).run()
    assert_same_bits(first["center"], first["rayleigh"])
    assert_same_bits(first["width"], first["residual"])
    for alternate in (True, False):
        second = Step(3, seed=7, noise=0.3, beta=0.05)
        second.state.copy_(first.state)
        second.run(alternate=alternate, ema=0.75)
        old, new = first["rayleigh"], second["rayleigh"]
        r0, r1 = first["residual"], second["residual"]
        middle = (old + new) / 2 if alternate else new
        spread = (r0 + r1) / 2 if alternate else r1
        torch.testing.assert_close(second["center"], middle, rtol=1e-15, atol=1e-15)
        width = spread + (new - old).abs() / 2
        torch.testing.assert_close(second["width"], width, rtol=1e-15, atol=1e-15)
        mean = 0.75 * first["h"] + 0.25 * middle
        torch.testing.assert_close(second["h_ema"], mean, rtol=1e-14, atol=1e-14)


def test_steps_converge_to_both_ends_of_a_spectrum():
    curvature = torch.linspace(-3, 7, N, dtype=F64) ** 3 / 10
    for sign in (1, -1):
        state = ops.new_state("cpu", 4, perturbation=SIZE, beta=0.0)
        q = orthonormal(4)
        for _ in range(400):
            beta = scalar(state, 4, "beta")
            step = Step(4, carried=q, curvature=curvature, sign=sign, beta=beta)
            ops.benettin_(state, step.gram, LOSSES, 4, sign=sign)
            q = ops.state_field(state, 4, "transform").T @ step.d
        wanted = curvature.sort(descending=sign > 0).values[:4]
        found = ops.state_field(state, 4, "rayleigh")
        bar = ops.state_field(state, 4, "width")
        assert ((found - wanted).abs() <= bar + 1e-9).all() and (bar < 0.5).all()


# --- spectra that are hard on an eigensolver ------------------------------------------------------

SPECTRA = {
    "all equal": lambda k: torch.full((k,), 2.5, dtype=F64),
    "two clusters": lambda k: torch.where(torch.arange(k) % 2 == 0, 4.0, -1.0).double(),
    "nearly equal": lambda k: 3 + 1e-13 * torch.arange(k, dtype=F64),
    "graded": lambda k: 10.0 ** -torch.arange(k, dtype=F64).div(k).mul(14),
    "zero": lambda k: torch.zeros(k, dtype=F64),
    "opposite": lambda k: torch.linspace(-5, 5, k, dtype=F64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", COUNTS)
def test_ritz_values_of_spectra_that_are_hard_to_take_apart(k, spectrum):
    values = SPECTRA[spectrum](k)
    curvature = torch.zeros(N, dtype=F64)
    curvature[:k] = values
    mix = torch.linalg.qr(torch.randn(k, k, dtype=F64, generator=torch.manual_seed(k)))[0]
    carried = SIZE * mix @ torch.eye(k, N, dtype=F64)
    step = Step(k, carried=carried, curvature=curvature, beta=0.05).run()
    wanted = values.sort(descending=True).values
    torch.testing.assert_close(
        step["rayleigh"], wanted, rtol=0, atol=2e-14 * (1 + wanted.abs().max())
    )
    # Roots of differences of terms as large as the largest value squared.
    assert (step["residual"] <= 2e-7 * max(1.0, float(wanted.abs().max()))).all()
    q = step["transform"].T @ step.d
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-15)
    growth = (1 + step.rate * wanted).abs().log()
    torch.testing.assert_close(step["exponent"], growth, rtol=0, atol=1e-12)


MATRICES = {
    "random": lambda value, i, j: value,
    "graded": lambda value, i, j: value * 10.0 ** -(i + j).double(),
    "near a multiple of 1": lambda value, i, j: torch.where(i == j, 3.0, 1e-14 * value),
    "zeros on the diagonal": lambda value, i, j: ((i + j) % 2).double(),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 14, 31, 32])
def test_ritz_values_of_matrices_that_are_hard_to_take_apart(k, kind):
    drawn = torch.rand(k, k, generator=torch.manual_seed(k), dtype=F64) * 2 - 1
    i, j = torch.arange(k)[:, None], torch.arange(k)[None, :]
    matrix = MATRICES[kind](drawn.tril() + drawn.tril(-1).T, i, j)
    step = Step(k, carried=SIZE * torch.eye(k, N, dtype=F64), beta=0.01)
    stack = torch.cat([step.c, matrix @ step.c])
    step.gram = stack @ stack.T
    step.run()
    wanted = torch.linalg.eigvalsh(matrix).flip(0)
    limit = 2e-14 * k * float(matrix.abs().max())
    torch.testing.assert_close(step["rayleigh"], wanted, rtol=0, atol=limit)
    q = step["transform"].T @ (step.c + 0.01 * matrix @ step.c)
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(k, dtype=F64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("factor", [1e-8, 1e-100, 1e100])
def test_the_size_of_the_separations_does_not_matter(factor):
    one = Step(5, noise=0.3).run()
    other = Step(5, noise=0.3, perturbation=SIZE * factor)
    other.gram = one.gram * factor * factor
    other.run()
    for name in ("rayleigh", "exponent", "width", "h", "beta"):
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12)


def test_a_panel_far_from_orthonormal_gives_the_same_ritz_values():
    carried = orthonormal(4)
    skew = torch.tril(torch.full((4, 4), 3.0, dtype=F64)) + torch.eye(4, dtype=F64)
    one, other = Step(4, carried=carried).run(), Step(4, carried=skew @ carried).run()
    torch.testing.assert_close(other["rayleigh"], one["rayleigh"], rtol=0, atol=1e-10)
    torch.testing.assert_close(other["residual"], one["residual"], rtol=0, atol=1e-8)
