"""benettin_: β, the curvatures and their error bars, and spectra that are hard to take apart."""

import math

import pytest
import torch

from benettin_steps import LOSSES, SIZE, N, Step, orthonormal, scalar
from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import F64, assert_same_bits
from panel_cases import COUNTS

# --- β, h and the error bar -----------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_step_sets_the_rate_alone(sign):
    step = Step(4, beta=0.0, sign=sign, noise=0.3).run(estimate=1)
    value, residual = step["rayleigh"].abs(), step["residual"]
    seen = torch.hypot(value, residual) if sign > 0 else value + residual
    largest = float(seen.max())
    assert math.isclose(step["beta"], (math.e - 1) / largest, rel_tol=1e-10)
    assert math.isclose(step["bound"], largest, rel_tol=1e-10)
    assert step["exponent"].isnan().all() and (step["pending"], step["again"]) == (1, 0)
    assert_same_bits(step["h"], step["center"])
    q = step["transform"].T @ step.c  # D = C
    torch.testing.assert_close(q @ q.T, SIZE**2 * torch.eye(4, dtype=F64), rtol=0, atol=1e-15)


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
        expected = panel_reference.curvature_of_growth(
            float(step["exponent"][i]), rate, momentum, "growth"
        )
        assert math.isclose(float(step["h"][i]), expected, rel_tol=1e-12)


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
        state = ops.new_panel_state("cpu", 4, perturbation=SIZE, beta=0.0)
        q = orthonormal(4)
        for _ in range(400):
            beta = scalar(state, 4, "beta")
            step = Step(4, carried=q, curvature=curvature, sign=sign, beta=beta)
            ops.benettin_(state, step.gram, LOSSES, 4, sign=sign)
            q = ops.panel_field(state, 4, "transform").T @ step.d
        wanted = curvature.sort(descending=sign > 0).values[:4]
        found = ops.panel_field(state, 4, "rayleigh")
        bar = ops.panel_field(state, 4, "width")
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
