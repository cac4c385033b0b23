"""Trace and spectral density against dense Hessians."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from classifiers import classifier, mlp
from nets import NAMES, case, quadratic


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trace_of_a_smooth_net(name, dtype):
    truth = case(name, seed=1, dtype=dtype)
    exact = float(truth.eigenvalues.sum())
    found = lyapcuda.trace(
        truth.closure, truth.model.parameters(), samples=30, difference="central"
    )
    assert abs(found.trace - exact) < 4 * found.standard_error + 1e-3 * abs(exact)
    # g(θ) twice; two products more to see how far they are off; g(θ) again, along which the loss
    # has to change as it says.
    assert found.samples == 30 and found.gradient_evaluations == 2 + 60 + 4 + 1
    assert found.product_error < 1e-3 * abs(exact) and not found.doubts


def test_the_standard_error_of_the_trace_is_honest():
    """Over 60 seeds the errors are spread as they say."""
    theta, closure, matrix = quadratic(1.0 / np.arange(1, 61), seed=2)
    exact, ratios = np.trace(matrix), []
    for seed in range(60):
        found = lyapcuda.trace(closure, [theta], samples=24, seed=seed)
        ratios.append((found.trace - exact) / found.standard_error)
    assert 0.7 < np.sqrt(np.mean(np.square(ratios))) < 1.5
    assert abs(np.mean(ratios)) < 0.5


def test_a_sketch_that_catches_everything_is_exact():
    theta, closure, _ = quadratic(np.concatenate([np.zeros(40), [1.0, -2.0, 5.0]]), seed=3)
    found = lyapcuda.trace(closure, [theta], samples=12)
    assert found.trace == pytest.approx(4.0, abs=1e-5)
    assert found.standard_error < 1e-5
    theta, closure, _ = quadratic(np.array([3.0, -1.0, 0.5]), seed=3)
    found = lyapcuda.trace(closure, [theta], samples=30)
    assert found.trace == pytest.approx(2.5, abs=1e-6) and found.standard_error < 1e-12


def test_hutchpp_beats_the_plain_mean():
    spectrum = np.concatenate([np.full(200, 0.01), [10.0, 20.0, 40.0]])
    theta, closure, _ = quadratic(spectrum, seed=4)
    found = lyapcuda.trace(closure, [theta], samples=30)
    # Hutchinson's variance is 2·(Σ of squares off the diagonal): here above 15 for 30 samples.
    assert abs(found.trace - spectrum.sum()) < 0.5


def exact_density(eigenvalues, grid, width):
    away = (grid[:, None] - eigenvalues[None]) / width
    return torch.exp(-0.5 * away * away).mean(1) / (width * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", ["tanh_mlp", "conv"])
def test_density_of_a_smooth_net(name):
    truth = case(name, seed=5, dtype=torch.float64)
    width = 0.05 * truth.h0
    found = lyapcuda.spectral_density(
        truth.closure, truth.model.parameters(), draws=20, steps=30, width=width
    )
    exact = exact_density(truth.eigenvalues, found.grid, width)
    step = float(found.grid[1] - found.grid[0])
    assert float(found.density.sum()) * step == pytest.approx(1.0, abs=1e-3)
    assert float((found.density - exact).abs().sum()) * step < 0.1
    # The mean of the spectrum is the trace over N, within its error.
    means = (found.nodes * found.weights).sum(1)
    mean, error = float(means.mean()), float(means.std() / math.sqrt(len(means)))
    assert abs(mean - float(truth.eigenvalues.mean())) < 4 * error
    # And where the errors are stated they are of the size of the errors made.
    inside = exact > 1e-2 * exact.max()
    ratio = (found.density - exact)[inside] / found.standard_error[inside]
    assert float(ratio.square().mean().sqrt()) < 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_among_kinks_products_are_exact(dtype):
    """By default; differences see a multiple of the trace there."""
    truth = classifier(lambda: mlp(nn.functional.relu), dtype=dtype)
    params = list(truth.model.parameters())
    exact = float(truth.eigenvalues.sum())
    found = lyapcuda.trace(truth.closure, params, samples=60)
    assert found.mode == "exact" and found.reason and not found.doubts
    assert abs(found.trace - exact) < 5 * found.standard_error < exact
    asked = lyapcuda.trace(truth.closure, params, samples=60, mode="exact")
    assert found.trace == pytest.approx(asked.trace, rel=1e-5)
    width = 0.05 * truth.h0
    density, same = (
        lyapcuda.spectral_density(truth.closure, params, draws=3, steps=15, width=width, mode=mode)
        for mode in ("auto", "exact")
    )
    assert density.mode == "exact" and not density.doubts
    torch.testing.assert_close(density.density, same.density, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [512, 2048])
def test_differences_among_kinks_say_how_far_they_are_off(samples):
    """The more samples, the closer the kinks."""
    truth = classifier(lambda: mlp(nn.functional.relu), samples=samples)
    exact, doubted = float(truth.eigenvalues.sum()), 0
    for seed in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = lyapcuda.trace(
                truth.closure, truth.model.parameters(), samples=24, seed=seed, mode="difference"
            )
        said = [str(w.message) for w in caught if w.category is lyapcuda.ConvergenceWarning]
        assert len(said) == len(found.doubts) <= 1 and all("kinks" in message for message in said)
        assert said or abs(found.trace - exact) < 5 * found.standard_error
        assert found.standard_error >= found.product_error > 0
        doubted += len(said)
    assert doubted == 3 or samples < 2048


def test_as_many_steps_as_parameters_give_the_eigenvalues():
    spectrum = np.array([-3.0, -1.0, 0.2, 0.5, 2.0])
    theta, closure, _ = quadratic(spectrum, seed=6)
    found = lyapcuda.spectral_density(closure, [theta], draws=2, steps=9)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        np.testing.assert_allclose(np.sort(nodes[weights > 0]), spectrum, atol=1e-6)
        assert float(weights.sum()) == pytest.approx(1.0)


def test_a_flat_loss():
    theta = nn.Parameter(torch.randn(6, dtype=torch.float64))
    slope = torch.randn(6, dtype=torch.float64)
    assert lyapcuda.trace(lambda: slope @ theta, [theta], samples=9).trace == 0.0
    found = lyapcuda.spectral_density(lambda: slope @ theta, [theta], draws=2, steps=3)
    assert float(found.grid[found.density.argmax()]) == pytest.approx(0.0, abs=found.width)


def test_reruns_are_bit_identical_and_leave_no_trace():
    truth = case("gelu_mlp", seed=7)
    before = [p.detach().clone() for p in truth.model.parameters()]
    random = torch.get_rng_state()
    runs = [
        lyapcuda.spectral_density(truth.closure, truth.model.parameters(), draws=2, steps=8)
        for _ in range(2)
    ]
    assert torch.equal(runs[0].density, runs[1].density)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, truth.model.parameters(), before))
    assert all(p.grad is None for p in truth.model.parameters())


def test_a_density_is_drawn_and_saved(tmp_path):
    truth = case("linear", seed=7)
    found = lyapcuda.spectral_density(truth.closure, truth.model.parameters(), draws=3, steps=10)
    axes = found.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 5000
    line = axes.lines[0]
    assert len(line.get_xdata()) == 1000
    single = lyapcuda.spectral_density(truth.closure, truth.model.parameters(), draws=1, steps=5)
    assert bool(single.standard_error.isnan().all())
    single.plot()


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ("trace", {"samples": 5}, "samples=5"),
        ("trace", {"samples": 7.5}, "samples=7.5"),
        ("trace", {"seed": -1}, "seed=-1"),
        ("spectral_density", {"draws": 0}, "draws=0"),
        ("spectral_density", {"steps": 129}, "steps=129"),
        ("spectral_density", {"width": 0.0}, "width=0.0"),
        ("spectral_density", {"points": -3}, "points=-3"),
    ],
)
def test_bad_arguments_are_named(call, options, message):
    truth = case("linear", seed=1)
    with pytest.raises(ValueError, match=message):
        getattr(lyapcuda, call)(truth.closure, truth.model.parameters(), **options)
