"""Estimates against exact Hessians of smooth nets, and against Algorithm 1 written out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import lyapcuda
from nets import NAMES, case, quadratic
from truths import growth_of_curvature


def run(tracker: lyapcuda.CurvatureTracker, closure, tol: float, at_most: int = 10000) -> None:
    """Steps until the residual is below tol·|h|, or has stopped falling (rounding is reached).

    Between two close eigenvalues it stands still for a while before it falls on.
    """
    best, since = math.inf, 0
    for _ in range(at_most):
        tracker.step(closure)
        residual = float(tracker.residual)
        best, since = (residual, 0) if residual < 0.98 * best else (best, since + 1)
        if residual < tol * abs(float(tracker.h)) or since > 300:
            return


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "dtype", "tol"),
    [("ce", torch.float32, 1e-3), ("ce", torch.float64, 1e-6), ("mse", torch.float64, 1e-6)],
)
def test_h0_of_a_smooth_net(name, kind, dtype, tol):
    truth = case(name, seed=1, dtype=dtype, kind=kind)
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters())
    run(tracker, truth.closure, tol / 100)
    assert float(tracker.h) == pytest.approx(truth.h0, rel=tol)


@pytest.mark.parametrize("name", ["tanh_mlp", "gelu_mlp", "conv"])
@pytest.mark.parametrize(
    ("seed", "dtype", "tol"), [(2, torch.float32, 1e-3), (3, torch.float64, 1e-6)]
)
def test_hN_of_a_smooth_net(name, seed, dtype, tol):  # noqa: N802
    truth = case(name, seed=seed, dtype=dtype)
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), which="SA")
    run(tracker, truth.closure, tol / 100)
    assert float(tracker.h) == pytest.approx(truth.hN, rel=tol)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_interval_contains_an_eigenvalue(which, dtype):
    """24 seeded nets, from the first steps to convergence: the error bar is never too short."""
    missed = []
    for seed in range(24):
        truth = case(NAMES[seed % 4], seed=seed, dtype=dtype)
        tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), which=which, seed=seed)
        for step in range(36):
            tracker.step(truth.closure)
            # The first value has no other side to be compared with.
            if step in (1, 2, 5, 10, 20, 30, 34, 35):
                low, high = tracker.interval.tolist()
                inside = (truth.eigenvalues >= low) & (truth.eigenvalues <= high)
                if not bool(inside.any()):
                    missed.append((seed, step, low, high))
    assert not missed


@pytest.mark.parametrize("name", NAMES)
def test_paper_mode_converges_to_h0_over_e_minus_1(name):
    """λ = 1 means 1 + βh0 = e, so the printed algorithm's 1/β is h0/(e − 1), not h0."""
    truth = case(name, seed=5, dtype=torch.float64)
    tracker = lyapcuda.CurvatureTracker(
        truth.model.parameters(), estimate="paper", perturbation=1e-4
    )
    for _ in range(600):
        tracker.step(truth.closure)
    assert float(tracker.exponent) == pytest.approx(1.0, abs=0.01)
    assert float(tracker.h) == pytest.approx(truth.h0 / (math.e - 1), rel=0.02)
    assert float(tracker.h) == pytest.approx(1 / float(tracker.beta), rel=1e-12)
    assert float(tracker.rayleigh) == pytest.approx(truth.h0, rel=1e-3)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_growth_inverts_the_growth_exactly(which):
    truth = case("tanh_mlp", seed=6, dtype=torch.float64)
    tracker = lyapcuda.CurvatureTracker(truth.model.parameters(), which=which, estimate="growth")
    run(tracker, truth.closure, 1e-6)
    exact = truth.h0 if which == "LA" else truth.hN
    assert float(tracker.h) == pytest.approx(exact, rel=1e-5)


# --- the quadratic with a known spectrum ---------------------------------------------------------


def algorithm_1(matrix: np.ndarray, theta: np.ndarray, q: np.ndarray, steps: int, sign: int = 1):
    """The paper's Algorithm 1, line by line, in NumPy: (λ, β, h) of every iteration."""
    size = np.linalg.norm(q)
    theta1, beta, rows = theta + q, 1.0, []
    for _ in range(steps):
        moved0 = theta + sign * beta * (matrix @ theta)
        moved1 = theta1 + sign * beta * (matrix @ theta1)
        exponent = np.log(np.linalg.norm(moved1 - moved0) / size)
        beta = beta / exponent
        theta1 = theta + (moved1 - moved0) * size / np.linalg.norm(moved1 - moved0)
        rows.append((exponent, beta, sign / beta))
    return rows


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize(
    "spectrum",
    [
        np.linspace(0.1, 9.0, 30),
        np.concatenate([np.linspace(-2, 3, 40), [17.0]]),
        np.concatenate([np.zeros(50), [0.5, 4.0]]),
    ],
    ids=["positive", "indefinite", "low_rank"],
)
def test_paper_mode_is_algorithm_1_as_printed(spectrum, which):
    theta, closure, matrix = quadratic(spectrum, seed=3)
    tracker = lyapcuda.CurvatureTracker(
        [theta], estimate="paper", perturbation=5e-2, which=which, seed=4
    )
    mine = []
    q = tracker.separations.vectors()[0][0].numpy().copy()  # its own first q, before it moves
    for _ in range(40):
        tracker.step(closure)
        mine.append([float(v) for v in (tracker.exponent, tracker.beta, tracker.h)])
    sign = 1 if which == "LA" else -1
    printed = algorithm_1(matrix, theta.detach().numpy(), q, 40, sign)
    assert np.linalg.norm(q) == pytest.approx(5e-2, rel=1e-12)
    np.testing.assert_allclose(np.array(mine), np.array(printed), rtol=1e-6)


def test_zero_curvature_is_zero_and_nothing_breaks():
    theta = torch.nn.Parameter(torch.randn(10))
    slope = torch.randn(10)
    tracker = lyapcuda.CurvatureTracker([theta])
    for _ in range(3):
        tracker.step(lambda: (slope * theta).sum())
    assert float(tracker.h) == 0.0
    assert tracker.interval.tolist() == [0.0, 0.0]


def test_rayleigh_keeps_the_sign_when_the_negative_end_is_larger():
    """|hN| = 5·h0: an ascent whose rate ignored hN would land on it."""
    theta, closure, _ = quadratic(np.concatenate([np.linspace(-10, 0, 20), [2.0]]), seed=1)
    up = lyapcuda.CurvatureTracker([theta])
    down = lyapcuda.CurvatureTracker([theta], which="SA")
    run(up, closure, 1e-7)
    run(down, closure, 1e-7)
    assert float(up.h) == pytest.approx(2.0, rel=1e-6)
    assert float(down.h) == pytest.approx(-10.0, rel=1e-6)


# --- momentum (App. B) ---------------------------------------------------------------------------


def test_momentum_formula_on_the_real_optimizer():
    """Two runs of torch's SGD with momentum part at the exponent that the formula inverts."""
    spectrum = np.concatenate([[-0.7], np.linspace(0.0, 3.0, 15)])
    theta, _, matrix = quadratic(spectrum, seed=8)
    tensor, lr, momentum = torch.tensor(matrix), 0.05, 0.6
    pair = [theta.detach().clone(), theta.detach() + 1e-6 * torch.randn(16, dtype=torch.float64)]
    pair = [torch.nn.Parameter(p) for p in pair]
    optimizers = [torch.optim.SGD([p], lr=lr, momentum=momentum) for p in pair]
    distances = []
    for _ in range(300):
        for p, optimizer in zip(pair, optimizers, strict=True):
            p.grad = (tensor @ p).detach()
            optimizer.step()
        distances.append(float((pair[1] - pair[0]).detach().norm()))
    exponent = math.log(distances[-1] / distances[-2])
    exact = lyapcuda.lyapunov.curvature_of_growth(exponent, -lr, momentum=momentum)
    assert exact == pytest.approx(-0.7, rel=1e-5)
    # The paper's linearised formula differs by the order of λ itself.
    linear = lyapcuda.lyapunov.curvature_of_growth(
        exponent, -lr, momentum=momentum, linearised=True
    )
    assert linear == pytest.approx(-(exponent**2 + exponent * 0.4) / lr, rel=1e-12)
    assert 0.01 < abs(linear / -0.7 - 1) < 0.2


@pytest.mark.parametrize("estimate", ["growth", "paper"])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_a_tracker_with_momentum_converges_to_the_exact_curvature(estimate, which):
    theta, closure, _ = quadratic(np.concatenate([[-0.7], np.linspace(0, 3, 15)]), seed=8)
    tracker = lyapcuda.CurvatureTracker(
        [theta], which=which, estimate=estimate, momentum=0.6, beta=0.05
    )
    for _ in range(2000 if which == "SA" else 800):
        tracker.step(closure)
    exact = 3.0 if which == "LA" else -0.7
    sign = 1 if which == "LA" else -1
    exponent = float(tracker.exponent)
    assert exponent == pytest.approx(
        growth_of_curvature(exact, sign * 0.05, momentum=0.6), rel=1e-6
    )
    if estimate == "growth":
        assert float(tracker.h) == pytest.approx(exact, rel=1e-6)
    else:
        assert float(tracker.h) == pytest.approx(
            (exponent**2 + 0.4 * exponent) / (sign * 0.05), rel=1e-9
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_schwarz_quotient_lies_between_the_rayleigh_quotient_and_h0(seed):
    theta, closure, matrix = quadratic(np.append(np.linspace(0, 5, 60), 7.0), seed)
    tracker = lyapcuda.CurvatureTracker([theta])
    assert tracker.schwarz.isnan()
    for _ in range(25):
        tracker.step(closure)
        rayleigh, found = float(tracker.rayleigh), float(tracker.schwarz)
        q = tracker.vector()[0]  # of the next step: compare with the quotients it will have
        y = torch.from_numpy(matrix) @ q
        assert rayleigh < found <= 7.0 * (1 + 1e-9)
        following = float(y @ y / (q @ y))
        tracker.step(closure)
        assert float(tracker.schwarz) == pytest.approx(following, rel=1e-6)
    assert found == pytest.approx(7.0, rel=1e-2)


def test_the_schwarz_quotient_stays_within_the_residual():
    """Where the spectrum has both signs it isn't bounded by h0, but by ρ ± r."""
    for which in ("LA", "SA"):
        theta, closure, _ = quadratic(np.linspace(-6, 5, 40), 0)
        tracker = lyapcuda.CurvatureTracker([theta], which=which)
        for _ in range(30):
            tracker.step(closure)
            away = (tracker.schwarz - tracker.rayleigh).abs()
            assert away <= tracker.residual * (1 + 1e-12)
            assert tracker.schwarz * tracker.rayleigh >= 0
    theta = torch.nn.Parameter(torch.ones(3))
    flat = lyapcuda.CurvatureTracker([theta])
    flat.step(lambda: theta.sum())
    assert float(flat.schwarz) == 0.0


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_schwarz_as_the_estimate(k, which):
    """h, its average and its interval follow the quotient; the separations are the same bits."""
    theta, closure, matrix = quadratic(np.linspace(-6, 5, 40), 1)
    values = torch.linalg.eigvalsh(torch.from_numpy(matrix))
    options = {"k": k, "which": which}
    plain = lyapcuda.CurvatureTracker([theta], **options)
    tracker = lyapcuda.CurvatureTracker([theta], estimate="schwarz", ema=0.5, **options)
    mean = None
    for step in range(30):
        before = tracker.h
        plain.step(closure)
        tracker.step(closure)
        h, (low, high) = tracker.h, tracker.interval.unbind(-1)
        torch.testing.assert_close(h, plain.schwarz, rtol=1e-14, atol=0)
        mean = h if mean is None else (mean + h) / 2
        torch.testing.assert_close(tracker.h_ema, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close((low + high) / 2, h, rtol=1e-12, atol=1e-12)
        away = (values[:, None] - h.reshape(-1)).abs().amin(0)
        slack = 1e-5 if step == 0 else 0.0  # one-sided
        assert bool((away <= (high - low).reshape(-1) / 2 + slack).all())
        shift = torch.hypot(tracker.residual, h - tracker.rayleigh)
        shift = shift if step == 0 else shift + (h - before).abs() / 2
        torch.testing.assert_close((high - low) / 2, shift, rtol=1e-9, atol=1e-12)
    for i in range(k):
        assert torch.equal(plain.vector(i)[0], tracker.vector(i)[0])


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_every_schwarz_interval_contains_an_eigenvalue(which):
    missed = []
    for seed in range(12):
        truth = case(NAMES[seed % 4], seed=seed, dtype=torch.float64)
        tracker = lyapcuda.CurvatureTracker(
            truth.model.parameters(), which=which, seed=seed, estimate="schwarz"
        )
        for step in range(25):
            tracker.step(truth.closure)
            low, high = tracker.interval.tolist()
            inside = (truth.eigenvalues >= low) & (truth.eigenvalues <= high)
            if step and not bool(inside.any()):
                missed.append((seed, step))
    assert missed == []


def test_schwarz_follows_where_the_mean_of_two_sides_lags():
    """One measurement in ten of a curvature that moves: what `every` is for."""
    scale = torch.ones((), dtype=torch.float64)
    theta, closure, _ = quadratic(np.append(np.linspace(0, 3, 30), 7.0), 2)
    errors = {}
    for estimate in ("rayleigh", "schwarz"):
        tracker = lyapcuda.CurvatureTracker([theta], every=10, estimate=estimate)
        errors[estimate] = []
        for step in range(300):
            scale.fill_(1.01**step)
            tracker.step(lambda: closure() * scale)
            if step % 10 == 0 and step >= 100:
                errors[estimate].append(abs(float(tracker.h) / (7.0 * float(scale)) - 1))
    assert max(errors["schwarz"]) < 1e-3 < 0.03 < min(errors["rayleigh"])
