"""v0: the user's vectors, or what a tracker follows already."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lyapcuda
from nets import Case, case, quadratic
from truths import is_off


def tracked(truth: Case, k: int, which: str, steps: int = 60) -> lyapcuda.CurvatureTracker:
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), k=k, which=which)
    for _ in range(steps):
        tracker.step(truth.closure)
    return tracker


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize(("k", "which"), [(1, "LA"), (3, "LA"), (1, "SA"), (2, "BE"), (3, "BE")])
def test_a_tracker_saves_gradients(k, which, mode):
    truth = case("gelu_mlp", seed=3, dtype=torch.float64)
    params = list(truth.model.parameters())
    tracker = tracked(truth, k, which)
    before, values = repr(tracker.state_dict()), tracker.h.clone()
    without = lyapcuda.eigsh(truth.closure, params, k, which, mode=mode)
    result = lyapcuda.eigsh(truth.closure, params, k, which, mode=mode, v0=tracker)
    for found in (without, result):
        assert bool(found.converged.all())
        assert not [i for i in range(k) if is_off(found, i, truth.eigenvalues)]
    assert result.gradient_evaluations < without.gradient_evaluations
    # The tracker is what it was, and goes on.
    assert repr(tracker.state_dict()) == before and torch.equal(tracker.h, values)
    tracker.step(truth.closure)
    assert torch.isfinite(tracker.h).all()


def test_several_vectors_are_all_used():
    """Both leading eigenvectors, roughly; a start from either alone takes longer."""
    spectrum = np.concatenate([np.linspace(-1, 2, 300), [3.0, 3.5]])
    theta, closure, matrix = quadratic(spectrum, seed=3)
    vectors = torch.tensor(np.linalg.eigh(matrix)[1].T[-2:].copy())
    generator = torch.Generator().manual_seed(0)
    near = vectors + 1e-3 * torch.randn(2, 302, dtype=torch.float64, generator=generator)
    counts = []
    for v0 in (None, near[0], near[1], near):
        result = lyapcuda.eigsh(closure, [theta], 2, v0=v0)
        assert bool(result.converged.all())
        assert result.eigenvalues.tolist() == pytest.approx([3.5, 3.0], rel=1e-3)
        counts.append(result.gradient_evaluations)
    assert counts[3] < min(counts[:3])


def test_only_directions_count():
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    params = list(truth.model.parameters())
    v = torch.randn(92, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = [lyapcuda.eigsh(truth.closure, params, v0=v0) for v0 in (v, 1024 * v, v[None])]
    for result in results[1:]:
        assert torch.equal(result.eigenvalues, results[0].eigenvalues)
        assert torch.equal(result.eigenvectors, results[0].eigenvectors)


@pytest.mark.parametrize("method", ["lanczos", "lyapunov"])
def test_every_method_takes_them(method):
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    params = list(truth.model.parameters())
    tracker = tracked(truth, 2, "LA", steps=30)
    result = lyapcuda.eigsh(truth.closure, params, 2, method=method, v0=tracker)
    assert bool(result.converged.all())
    assert not [i for i in range(2) if is_off(result, i, truth.eigenvalues)]


@pytest.mark.parametrize(
    ("v0", "says"),
    [
        (torch.ones(91), r"v0: expected .*\(92,\).*\(91,\)"),
        (torch.ones(92, 1), r"v0: expected .*\(92,\).*\(92, 1\)"),
        (torch.ones(1, 2, 92), r"v0: expected .*\(1, 2, 92\)"),
        (torch.ones(92, dtype=torch.complex64), "v0: expected a real tensor"),
        ([1.0] * 92, "v0: expected a real tensor.*list"),
        (torch.zeros(92), "v0: its norm is 0"),
        (torch.stack([torch.ones(92), torch.zeros(92)]), "v0: its norm is 0"),
        (torch.full((92,), torch.nan), "v0: its norm is nan"),
    ],
)
def test_what_is_no_start_vector_is_named(v0, says):
    truth = case("tanh_mlp", seed=1)
    with pytest.raises((TypeError, ValueError), match=says):
        lyapcuda.eigsh(truth.closure, truth.model.parameters(), v0=v0)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_a_tracker_that_cannot_help_is_named(which):
    truth, other = case("tanh_mlp", seed=1), case("gelu_mlp", seed=1)
    params = list(truth.model.parameters())
    with pytest.raises(ValueError, match="v0: this tracker follows 6 other parameters than the 4"):
        lyapcuda.eigsh(truth.closure, params, v0=tracked(other, 2, which, steps=2))
    new = lyapcuda.CurvatureTracker(params, k=2, which=which)
    before = repr(new.state_dict())
    with pytest.raises(ValueError, match="v0: this tracker hasn't measured anything yet"):
        lyapcuda.eigsh(truth.closure, params, v0=new)
    assert repr(new.state_dict()) == before
