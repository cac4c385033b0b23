"""LyapunovSGD's rate: gain over a peak of the curvature that rises at once and falls slowly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case
from optim_cases import exact, quadratic


class Scaled:
    """½·scale·(4·θ0² + θ1²), whose curvature is what the test sets it to."""

    def __init__(self, **options):
        self.theta, closure = quadratic([4.0, 1.0])
        self.scale = 1.0
        self.closure = lambda: self.scale * closure()
        self.optimizer = exact([self.theta], max_lr=100.0, decay=0.9, **options)

    def rate(self, scale):
        self.scale = scale
        self.optimizer.step(self.closure)
        return float(self.optimizer.lr)


@pytest.mark.parametrize("k", [1, 2])
def test_the_rate_falls_at_once_and_rises_slowly(k):
    run = Scaled(k=k)
    assert run.rate(1.0) == pytest.approx(1 / (4 if k == 1 else 1), rel=1e-3)
    low = [run.rate(8.0) for _ in range(k)][-1]  # for k = 2, h is the mean of two steps
    assert low == pytest.approx(1 / (32 if k == 1 else 8), rel=1e-3)
    rates = [low, *(run.rate(1.0) for _ in range(6))]
    growth = [b / a for a, b in zip(rates, rates[1:], strict=False)]
    assert 1.04 < min(growth) and max(growth) <= 1 / 0.9 + 1e-9


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_without_positive_curvature_the_rate_does_not_leap(scale):
    run = Scaled()
    first = run.rate(1.0)
    assert first == pytest.approx(0.25, rel=1e-3)
    assert all(run.rate(scale) == pytest.approx(first, rel=1e-3) for _ in range(3))


def test_a_measurement_that_is_not_finite_leaves_the_peak():
    run = Scaled()
    run.rate(1.0)
    peak = run.optimizer._peak.value
    assert run.rate(math.inf) == 0.0
    assert torch.equal(run.optimizer._peak.value, peak)


def test_steps_between_measurements_leave_the_peak():
    run = Scaled(every=3, gain=0.1)
    run.optimizer.warmup(run.closure)
    peaks = {float(run.optimizer._peak.value)}
    for _ in range(6):
        run.rate(0.5)
        peaks.add(float(run.optimizer._peak.value))
    assert len(peaks) == 3  # of the warm-up, and of two measurements


def test_defaults_are_those_of_the_estimate():
    def settings(**options):
        group = lyapcuda.LyapunovSGD([nn.Parameter(torch.ones(2))], **options).param_groups[0]
        return group["lr"], group["momentum"]

    assert settings() == (1.5, 0.9) and settings(k=2) == settings(every=2) == (1.0, 0.9)
    assert settings(nesterov=True) == (1.0, 0.9) and settings(momentum=0.0) == (1.0, 0.0)
    assert settings(estimate="paper") == settings(estimate="growth") == (1.0, 0.0)
    assert settings(estimate="paper", momentum=0.5, gain=0.3) == (0.3, 0.5)


def test_the_papers_rate_is_one_over_its_average():
    truth = case("tanh_mlp", seed=1)
    optimizer = lyapcuda.LyapunovSGD(truth.model.parameters(), estimate="paper")
    for _ in range(4):
        optimizer.step(truth.closure)
        assert float(optimizer.lr) == pytest.approx(1 / float(optimizer.tracker.h_ema), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_the_peak_is_a_part_of_the_state(k):
    run, other = Scaled(k=k), Scaled(k=k)
    for scale in (1.0, 8.0, 1.0):
        run.rate(scale)
    saved = run.optimizer.state_dict()
    with torch.no_grad():
        other.theta.copy_(run.theta)
    other.optimizer.load_state_dict(saved)
    assert other.rate(1.0) == run.rate(1.0) < 0.25
    before = other.optimizer._peak.value
    for damaged in ({"peak": torch.ones(3)}, None):
        with pytest.raises(ValueError, match="state_dict"):
            other.optimizer.load_state_dict({**saved, "peak": damaged})
        assert torch.equal(other.optimizer._peak.value, before)
