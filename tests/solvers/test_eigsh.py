"""The solver against dense Hessians, prescribed spectra and scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from nets import SOLVED, case, quadratic
from truths import is_off, wanted

METHODS = ("lanczos", "lyapunov")


def assert_intervals_hold(result, eigenvalues) -> None:
    for low, high in result.interval.tolist():
        assert bool(((eigenvalues >= low) & (eigenvalues <= high)).any())


# Which ends and how many.
WANTED = [("LA", 1), ("LA", 2), ("LA", 5), ("LM", 1), ("BE", 2), ("BE", 5), ("LA", 14)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("which", "k"), WANTED)
@pytest.mark.parametrize("name", SOLVED)
def test_single_precision_to_a_thousandth(name, which, k, method):
    if name == "linear" and which == "BE":
        pytest.skip("convex: its lower end is zero, tested apart")
    if method == "lyapunov" and k == 14 and name not in ("conv", "attention"):
        pytest.skip("slow; tested on a smaller net, see test_climbing")
    truth = case(name, seed=3)
    result = lyapcuda.eigsh(
        truth.closure,
        truth.model.parameters(),
        k,
        which,
        method=method,
        tol=1e-3,
        # The inner ones are small: forward differences aren't good for a thousandth of them.
        difference="central" if k > 5 else None,
    )
    exact = wanted(truth.eigenvalues, k, which)
    assert bool(result.converged.all())
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-3, atol=1e-4 * truth.h0)
    assert_intervals_hold(result, truth.eigenvalues)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_both_ends_of_a_known_spectrum(which, method):
    spectrum = np.concatenate([[-6.0, -4.5, -2.0], np.linspace(-0.5, 0.5, 20), [1.5, 3.0, 5.0]])
    theta, closure, _ = quadratic(spectrum, seed=7)
    result = lyapcuda.eigsh(closure, [theta], 5, which, method=method, tol=1e-4)
    exact = wanted(torch.tensor(np.sort(spectrum)), 5, which)
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-4, atol=0)
    assert bool(result.converged.all())


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize("name", ["tanh_mlp", "gelu_mlp", "conv"])
def test_double_precision_central_to_a_millionth(name, which):
    truth = case(name, seed=4, dtype=torch.float64)
    result = lyapcuda.eigsh(
        truth.closure,
        truth.model.parameters(),
        4,
        which,
        tol=1e-6,
        difference="central",
    )
    exact = wanted(truth.eigenvalues, 4, which)
    assert bool(result.converged.all())
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-6, atol=1e-8 * truth.h0)
    assert_intervals_hold(result, truth.eigenvalues)
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), mode="exact")
    for value, vector in zip(result.eigenvalues, result.eigenvectors, strict=True):
        assert float((operator @ vector - value * vector).norm()) < 1e-2 * truth.h0
        assert float(vector.norm()) == pytest.approx(1.0, abs=1e-9)


# Nets whose both ends are told apart, in turn.
INDEFINITE = ("attention", "gelu_mlp", "tanh_mlp")


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize(
    ("k", "dtype", "tol"),
    [
        *((k, torch.float32, 1e-3) for k in range(1, 15)),
        *((k, torch.float64, 1e-6) for k in (1, 2, 3, 8, 14)),
    ],
)
def test_any_number_at_either_end(k, which, dtype, tol):
    truth = case(INDEFINITE[k % 3], seed=k, dtype=dtype)
    params = truth.model.parameters()
    result = lyapcuda.eigsh(truth.closure, params, k, which, tol=tol, difference="central")
    assert bool(result.converged.all())
    assert not [i for i in range(k) if is_off(result, i, truth.eigenvalues)]
    assert_intervals_hold(result, truth.eigenvalues)


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize(
    ("k", "dtype", "tol"),
    [
        *((k, torch.float32, 1e-3) for k in (1, 2, 3, 5, 8, 11, 14)),
        *((k, torch.float64, 1e-6) for k in (5, 14)),
    ],
)
def test_climbing_finds_any_number_at_either_end(k, which, dtype, tol):
    truth = case("tiny", seed=1, dtype=dtype)
    params = truth.model.parameters()
    result = lyapcuda.eigsh(
        truth.closure, params, k, which, method="lyapunov", tol=tol, difference="central"
    )
    assert bool(result.converged.all())
    assert not [i for i in range(k) if is_off(result, i, truth.eigenvalues)]
    assert_intervals_hold(result, truth.eigenvalues)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_fourteen_of_a_convolution_at_either_end(which):
    truth = case("conv", seed=41)
    params = truth.model.parameters()
    result = lyapcuda.eigsh(truth.closure, params, 14, which, difference="central")
    assert bool(result.converged.all())
    assert not [i for i in range(14) if is_off(result, i, truth.eigenvalues)]
    assert_intervals_hold(result, truth.eigenvalues)


def test_forward_differences_give_way_where_they_are_too_coarse():
    truth = case("linear", seed=40)
    params = list(truth.model.parameters())
    result = lyapcuda.eigsh(truth.closure, params, 8, mode="difference")
    with pytest.warns(lyapcuda.ConvergenceWarning, match="aren't good for more"):
        forward = lyapcuda.eigsh(truth.closure, params, 8, difference="forward")
    central = lyapcuda.eigsh(truth.closure, params, 8, difference="central")
    assert result.difference == "central" and bool(result.converged.all())
    # The curvature hardly changes with the distance: Δq is the usual one.
    assert result.perturbation == central.perturbation
    torch.testing.assert_close(result.eigenvalues, central.eigenvalues, rtol=1e-3, atol=0)
    # g(θ) is known by then; the truncation is measured after each run. At the end g(θ) is taken
    # again, for central differences have written over it: the loss has to change as it says.
    second = result.iterations - forward.iterations
    assert result.gradient_evaluations == forward.gradient_evaluations + 2 * second + 2 + 1
    assert forward.gradient_evaluations == 2 + forward.iterations + 2
    assert len(result.history) == result.iterations
    # Not where it was maxiter that ended them: a second run would end there as well.
    fewer = forward.iterations // 2
    with pytest.warns(lyapcuda.ConvergenceWarning):
        short = lyapcuda.eigsh(truth.closure, params, 8, maxiter=fewer, mode="difference")
    assert (short.difference, short.iterations) == ("forward", fewer)


def test_against_scipy_on_exact_products():
    """A net too large for a dense Hessian: 12,965 parameters."""
    from scipy.sparse.linalg import eigsh

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 100), nn.Tanh(), nn.Linear(100, 32), nn.Linear(32, 1))
    x, y = torch.randn(128, 96), torch.randn(128, 1)

    def closure():
        return nn.functional.mse_loss(model(x), y)

    operator = lyapcuda.HessianOperator(closure, model.parameters(), mode="exact")
    start = np.ones(operator.shape[0])
    exact = eigsh(operator.to_scipy(), 5, which="LA", tol=1e-6, v0=start)[0]
    result = lyapcuda.eigsh(closure, model.parameters(), 5)
    assert bool(result.converged.all())
    np.testing.assert_allclose(result.eigenvalues, exact[::-1], rtol=1e-3)


def test_double_precision_goes_beyond_what_single_can():
    truth = case("gelu_mlp", seed=5, dtype=torch.float64)
    result = lyapcuda.eigsh(truth.closure, truth.model.parameters(), 3, mode="exact", tol=1e-9)
    exact = wanted(truth.eigenvalues, 3, "LA")
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_multiple_and_clustered_eigenvalues(method):
    spectrum = np.concatenate([np.linspace(-1, 1, 30), [4.0, 4.0, 4.001, 5.0, 5.0]])
    theta, closure, _ = quadratic(spectrum, seed=5)
    result = lyapcuda.eigsh(
        closure, [theta], 5, method=method, tol=1e-6, difference="central", verify=True
    )
    exact = torch.tensor([5.0, 5.0, 4.001, 4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-6, atol=0)
    assert bool(result.converged.all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 5, 14])
def test_all_eigenvalues_of_a_small_problem(n, method):
    spectrum = np.linspace(-2.0, 3.0, n) if n > 1 else np.array([1.5])
    theta, closure, _ = quadratic(spectrum, seed=6)
    result = lyapcuda.eigsh(closure, [theta], n, method=method, tol=1e-6, difference="central")
    np.testing.assert_allclose(result.eigenvalues, spectrum[::-1], rtol=1e-6, atol=1e-7)
    assert bool(result.converged.all())


@pytest.mark.parametrize("method", METHODS)
def test_a_flat_loss_has_zeros(method):
    theta = nn.Parameter(torch.randn(9, dtype=torch.float64))
    slope = torch.randn(9, dtype=torch.float64)
    result = lyapcuda.eigsh(lambda: slope @ theta, [theta], 3, method=method)
    assert result.eigenvalues.tolist() == pytest.approx([0.0] * 3, abs=1e-7)
    assert bool(result.converged.all())


def test_the_zero_end_of_a_convex_loss():
    truth = case("linear", seed=3)
    result = lyapcuda.eigsh(truth.closure, truth.model.parameters(), 2, "SA")
    assert result.eigenvalues.tolist() == pytest.approx([0.0, 0.0], abs=1e-3 * truth.h0)
    for low, high in result.interval.tolist():
        assert low <= 0.0 <= high


def test_one_gradient_an_iteration_and_four_besides():
    """Forward differences: a gradient an iteration, two at θ, two for what they are worth."""
    truth = case("gelu_mlp", seed=3)
    result = lyapcuda.eigsh(truth.closure, truth.model.parameters(), difference="forward")
    assert result.gradient_evaluations == result.iterations + 4 <= 17
    assert len(result.history) == result.iterations


def test_streamed_batches_give_the_full_batch():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x, y = torch.randn(70, 6).double(), torch.randint(0, 3, (70,))

    def closure(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16)  # the last one is smaller
    options = dict(k=3, tol=1e-6, difference="central")
    streamed = lyapcuda.eigsh(closure, model.parameters(), data=loader, **options)
    whole = lyapcuda.eigsh(lambda: closure((x, y)), model.parameters(), **options)
    torch.testing.assert_close(streamed.eigenvalues, whole.eigenvalues, rtol=1e-7, atol=0)
    assert streamed.gradient_evaluations == whole.gradient_evaluations
    with pytest.raises((TypeError, ValueError), match="data"):
        lyapcuda.eigsh(closure, model.parameters(), data=iter(loader), **options)


def test_a_subset_by_name():
    truth = case("tanh_mlp", seed=3, dtype=torch.float64)
    named = list(truth.model.named_parameters())
    result = lyapcuda.eigsh(truth.closure, named, 2, select="2.*", tol=1e-6)
    only = lyapcuda.eigsh(truth.closure, truth.model[2].parameters(), 2, tol=1e-6)
    torch.testing.assert_close(result.eigenvalues, only.eigenvalues, rtol=1e-6, atol=0)
    assert [tuple(v.shape) for v in result.unflatten(0)] == [(4, 8), (4,)]
    with pytest.raises(ValueError, match="select.*'nothing"):
        lyapcuda.eigsh(truth.closure, named, 2, select=["2.*", "nothing*"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interval_of_16_bit_parameters_holds_the_value_of_float32(dtype):
    truth = case("gelu_mlp", seed=4)
    half = case("gelu_mlp", seed=4).model.to(dtype)
    with torch.no_grad():
        for p, rounded in zip(truth.model.parameters(), half.parameters(), strict=True):
            p.copy_(rounded)
    batch = torch.randn(64, 10)

    def loss(model, x):
        return model(x).float().square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        found = lyapcuda.eigsh(lambda: loss(half, batch.to(dtype)), half.parameters(), tol=0.05)
    exact = lyapcuda.eigsh(lambda: loss(truth.model, batch), truth.model.parameters())
    # It is the curvature of a loss that itself rounds to 8 (11) bits.
    low, high = found.interval[0].tolist()
    assert low <= float(exact.eigenvalues) <= high < 2 * float(exact.eigenvalues)


def test_what_is_not_known_is_not_called_converged():
    truth = case("gelu_mlp", seed=3)
    with pytest.warns(lyapcuda.ConvergenceWarning, match="3 of 3"):
        result = lyapcuda.eigsh(truth.closure, truth.model.parameters(), 3, maxiter=3)
    assert not bool(result.converged.any())


def test_everything_is_restored_and_reruns_are_bit_identical():
    truth = case("gelu_mlp", seed=3)
    before = [p.detach().clone() for p in truth.model.parameters()]
    random = torch.get_rng_state()
    runs = [lyapcuda.eigsh(truth.closure, truth.model.parameters(), 2) for _ in range(2)]
    assert torch.equal(runs[0].eigenvectors, runs[1].eigenvectors)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, truth.model.parameters(), before))
    assert all(p.grad is None for p in truth.model.parameters())


def test_curvature_at_two_scales_shows_kinks():
    smooth = case("gelu_mlp", seed=3, dtype=torch.float64)
    result = lyapcuda.eigsh(smooth.closure, smooth.model.parameters(), 2, tol=1e-6)
    scales = lyapcuda.finite_scale(
        smooth.closure, smooth.model.parameters(), result, perturbations=(1e-4, 1e-3)
    )
    torch.testing.assert_close(
        scales.curvatures, result.eigenvalues.expand(2, 2), rtol=1e-4, atol=0
    )
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    kinked = lyapcuda.finite_scale(
        lambda: theta.abs().sum(), [theta], torch.eye(3).double()[:1], perturbations=(0.1, 1.0)
    )
    # |x| has slope ±1: a curvature of 1/Δq at every scale Δq.
    assert kinked.curvatures[:, 0].tolist() == pytest.approx([10.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 10**6}, "k=1000000"),
        ({"which": "XX"}, "which='XX'"),
        ({"tol": 0.0}, "tol=0"),
        ({"tol": math.nan}, "tol=nan"),
        ({"method": "guess"}, "method='guess'"),
        ({"maxiter": 0}, "maxiter=0"),
        ({"ncv": 1}, "ncv=1"),
        ({"seed": -1}, "seed=-1"),
        ({"perturbation": -1.0}, "perturbation=-1"),
        ({"difference": "sideways"}, "difference='sideways'"),
        ({"mode": "magic"}, "mode='magic'"),
        ({"v0": torch.zeros(3)}, "v0"),
        ({"select": "a*"}, "select"),
    ],
)
def test_bad_arguments_are_named(options, message):
    truth = case("linear", seed=1)
    with pytest.raises((ValueError, TypeError), match=message):
        lyapcuda.eigsh(truth.closure, truth.model.parameters(), **options)
