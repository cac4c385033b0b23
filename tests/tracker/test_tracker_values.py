"""CurvatureTracker: what its values are of: which loss, in which precision, on which side of θ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lyapcuda
from nets import case


def test_storage_that_is_used_again_for_the_second_gradient():
    theta, reused = nn.Parameter(torch.ones(4)), torch.zeros(4)

    def closure():
        theta.grad = reused.copy_(2 * theta.detach())
        return theta.detach().square().sum()

    tracker = lyapcuda.CurvatureTracker([theta])
    for _ in range(3):
        tracker.step(closure, leave_grad=True)
    assert float(tracker.h) == pytest.approx(2.0, rel=1e-4)


def test_weight_decay_is_part_of_the_loss():
    truth = case("tanh_mlp", seed=3, dtype=torch.float64)
    decay = 0.25

    def penalised():
        squares = sum(p.square().sum() for p in truth.model.parameters())
        return truth.closure() + 0.5 * decay * squares

    outside = lyapcuda.CurvatureTracker(truth.model.parameters(), weight_decay=decay)
    group = [{"params": truth.model.parameters(), "weight_decay": decay}]
    in_group = lyapcuda.CurvatureTracker(group)
    inside = lyapcuda.CurvatureTracker(truth.model.parameters())
    for _ in range(200):
        outside.step(truth.closure)
        in_group.step(truth.closure)
        inside.step(penalised)
    for tracker in (outside, in_group, inside):
        assert float(tracker.h) == pytest.approx(truth.h0 + decay, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_the_curvature(dtype):
    """θ + q is rounded; dividing by what was realised keeps the curvature right."""
    torch.manual_seed(0)
    spectrum = torch.linspace(0, 3, 400)
    spectrum[7] = 9.0
    basis, _ = torch.linalg.qr(torch.randn(400, 400))
    matrix = (basis * spectrum) @ basis.T
    theta = nn.Parameter(torch.randn(400).to(dtype))
    tracker = lyapcuda.CurvatureTracker([theta])
    for _ in range(60):
        tracker.step(lambda: 0.5 * theta.float() @ matrix @ theta.float())
    assert float(tracker.h) == pytest.approx(9.0, rel=0.02)
    low, high = tracker.interval.tolist()
    assert low <= 9.0 <= high


def test_a_perturbation_lost_in_rounding_gets_a_warning():
    theta = nn.Parameter(torch.randn(1000))
    tracker = lyapcuda.CurvatureTracker([theta], perturbation=1e-7)
    with pytest.warns(UserWarning, match="perturbation=1e-07.*advised"):
        tracker.step(lambda: theta.square().sum())


def test_the_separation_changes_sides_at_every_step():
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters())
    paper = lyapcuda.CurvatureTracker(truth.model.parameters(), estimate="paper")
    sides = {tracker: [], paper: []}
    for _ in range(60):
        for each, vectors in sides.items():
            each.step(truth.closure)
            vectors.append(torch.cat([v.reshape(-1) for v in each.vector()]))
    for each, sign in ((tracker, -1), (paper, 1)):
        for a, b in zip(sides[each][30:], sides[each][31:], strict=False):
            assert sign * float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99
