"""Exponents and curvatures: the relations themselves, and the default separation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lyapcuda import CurvatureTracker
from lyapcuda.dynamics.lyapunov import curvature_of_growth
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.params.flat import FlatLayout
from truths import growth_of_curvature

rates = st.floats(1e-3, 10.0)
curvatures = st.floats(1e-3, 1e3)


@given(curvatures, rates)
def test_growth_and_curvature_are_inverse(h, beta):
    assert curvature_of_growth(growth_of_curvature(h, beta), beta) == pytest.approx(h, rel=1e-9)


@given(curvatures, rates)
def test_descent_sees_negative_curvature(h, alpha):
    exponent = growth_of_curvature(-h, -alpha)
    assert exponent > 0
    assert curvature_of_growth(exponent, -alpha) == pytest.approx(-h, rel=1e-9)


@given(curvatures, rates, st.floats(0.01, 0.99))
def test_momentum_is_inverse_too(h, beta, momentum):
    exponent = growth_of_curvature(h, beta, momentum=momentum)
    assert curvature_of_growth(exponent, beta, momentum=momentum) == pytest.approx(h, rel=1e-6)


@given(st.floats(1e-4, 3.0), rates, st.floats(0.0, 0.99))
def test_the_papers_formulas_are_the_small_growth_limit(exponent, rate, momentum):
    """App. A: h = λ/rate. App. B: h = (λ² + λ(1 − m))/rate."""
    paper = curvature_of_growth(exponent, rate, momentum=momentum, linearised=True)
    assert paper == pytest.approx(
        (exponent**2 + exponent * (1 - momentum)) / rate if momentum else exponent / rate
    )
    small = 1e-6
    exact = curvature_of_growth(small, rate, momentum=momentum)
    linear = curvature_of_growth(small, rate, momentum=momentum, linearised=True)
    # The exact one is (e^λ − 1)(e^λ − m)/(rate·e^λ): the relative difference is of order λ/(1 − m).
    assert exact == pytest.approx(linear, rel=2 * small / (1 - momentum))


def test_at_exponent_one_the_paper_is_off_by_e_minus_one():
    beta = 0.4
    assert curvature_of_growth(1.0, beta) / curvature_of_growth(
        1.0, beta, linearised=True
    ) == pytest.approx(math.e - 1)


def test_complex_modes_grow_by_the_root_of_the_momentum():
    assert growth_of_curvature(-3.0, 0.5, momentum=0.9) == pytest.approx(0.5 * math.log(0.9))


@pytest.mark.parametrize(
    ("rate", "momentum", "message"),
    [(0.0, 0.0, "rate=0.0"), (math.nan, 0.0, "rate=nan"), (1.0, 1.0, "momentum=1.0")],
)
def test_bad_arguments_are_named(rate, momentum, message):
    with pytest.raises(ValueError, match=message):
        curvature_of_growth(1.0, rate, momentum=momentum)


def test_default_perturbation_grows_with_size_and_coarseness():
    def size(value, dtype):
        return default_perturbation(FlatLayout([nn.Parameter(torch.full((100,), value).to(dtype))]))

    assert size(2.0, torch.float32) == pytest.approx(2 * size(1.0, torch.float32))
    assert size(1.0, torch.float64) < size(1.0, torch.float32) < size(1.0, torch.bfloat16)
    assert size(0.0, torch.float32) == pytest.approx(1e-2 * size(1.0, torch.float32))


def test_default_perturbation_of_a_large_smooth_net_is_less():
    def size(n, **options):
        return default_perturbation(FlatLayout([nn.Parameter(torch.ones(n))]), **options) / n**0.5

    assert size(1000, smooth=True) == size(1000)
    assert size(10**6, smooth=True) == pytest.approx(size(10**6) * 8.0 / 10**3 / 0.25)
    coarse = 2.0**-10  # TF32
    assert size(64, smooth=True, epsilon=coarse) == size(64, epsilon=coarse)
    small, large = (size(n, smooth=True, epsilon=coarse) for n in (10**4, 10**6))
    assert large == pytest.approx(small / 10)
    # Kinks want no larger one for coarse arithmetic.
    assert large < size(10**6, epsilon=coarse) == size(10**6)


def test_default_perturbation_of_16_bit_parameters_does_not_shrink_with_the_net():
    def size(n, **options):
        parameter = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        return default_perturbation(FlatLayout([parameter]), **options) / n**0.5

    assert size(10**6, smooth=True) == pytest.approx(size(100))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("activation", "wrap", "smooth"),
    [(nn.GELU, None, True), (nn.ReLU, None, False), (nn.GELU, float, True)],
)
def test_a_tracker_adapts_its_separation_to_a_loss_without_kinks(k, activation, wrap, smooth):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), activation(), nn.Linear(60, 2))
    x = torch.randn(16, 40)

    def closure():
        loss = model(x).square().mean()
        if wrap is None:
            return loss
        loss.backward()
        return wrap(loss)

    layout = FlatLayout(model.parameters())
    tracker = CurvatureTracker(model.parameters(), k=k)
    mean = CurvatureTracker(model.parameters(), k=k, estimate="rayleigh")
    own = CurvatureTracker(model.parameters(), k=k, perturbation=0.05)
    for _ in range(3):
        for each in (tracker, mean, own):
            each.step(closure)
    assert mean.perturbation == default_perturbation(layout, smooth=smooth)
    assert (mean.perturbation < 0.7 * default_perturbation(layout)) == smooth
    # The default estimate is of one side of θ alone, off by the first order in Δq: a smaller one.
    one_sided = default_perturbation(layout, smooth=smooth, one_sided=True)
    assert tracker.perturbation == one_sided
    assert (one_sided < 0.3 * mean.perturbation) == smooth
    assert own.perturbation == 0.05
