"""Differences on losses whose curvature changes over a known distance, along a known vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.basis import Basis
from lyapcuda.dynamics.perturbation import separation_size
from lyapcuda.solvers.difference_error import truncation_along
from truths import is_off

N, LEAD = 200, 30.0


def bent(length: float, dtype: torch.dtype = torch.float32, lead: float = LEAD, even: bool = False):
    """(θ, closure, u, eigenvalues): a bowl, and along u an exponential (``even``: a cosh) whose
    second derivative at θ is ``lead``, the third and fourth that over ``length`` and its square.
    """
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([torch.linspace(-1, 3, N - 3), torch.tensor([-10.0, 10.0, lead])]).double()
    turn = torch.linalg.qr(torch.randn(N, N, generator=generator).double())[0]
    theta = nn.Parameter(torch.randn(N, generator=generator).to(dtype))
    origin, u, rest = theta.detach().clone(), turn[-1].to(dtype), turn[:-1].to(dtype)

    def closure() -> torch.Tensor:
        along, beside = u @ (theta - origin), rest @ (theta - origin)
        x = along.double() / length  # what rounds is θ alone
        bump = torch.cosh(x) - 1 if even else torch.expm1(x) - x
        return lead * length**2 * bump + (values[:-1].to(dtype) * beside**2).sum() / 2

    return theta, closure, u, values.sort().values


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("lead", [LEAD, -LEAD])
def test_the_measured_error_is_that_of_the_difference(difference, lead):
    length, step = 0.05, 0.004
    theta, closure, u, _ = bent(length, torch.float64, lead)
    operator = lyapcuda.HessianOperator(closure, [theta], difference=difference, perturbation=step)
    seen = float(u @ (operator @ u))
    rows = Basis.empty(operator.layout, 2)
    operator.layout.scatter(u, rows.row(0))
    found = truncation_along(operator, rows[:1], rows[1:], seen, residual=0.0, tol=1e-3)
    assert not found.jumps
    assert found.length == pytest.approx(length, rel=0.02)
    assert found.error == pytest.approx(abs(seen - lead) / abs(lead), rel=0.1)
    # Nothing is left behind.
    assert operator.perturbation == step
    assert float(u @ (operator @ u)) == seen
    if difference == "central":
        assert found.central(step) == pytest.approx(found.error, rel=1e-6)


@pytest.mark.parametrize("method", ["lanczos", "lyapunov"])
@pytest.mark.parametrize(("which", "lead"), [("LA", LEAD), ("SA", -LEAD), ("LM", LEAD)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sharp_bend_takes_a_smaller_separation(method, which, lead, dtype):
    theta, closure, _, exact = bent(0.02, dtype, lead)
    result = lyapcuda.eigsh(closure, [theta], 2, which, method=method, mode="difference")
    assert bool(result.converged.all())
    assert not [i for i in range(2) if is_off(result, i, exact)]
    at_first = separation_size(lyapcuda.HessianOperator(closure, [theta]).layout, "central")
    if dtype == torch.float32:
        assert result.difference == "central" and result.perturbation < 0.2 * at_first
    else:  # forward differences do
        assert result.difference == "forward"


@pytest.mark.parametrize("even", [False, True])
def test_central_differences_alone_take_a_smaller_one_too(even):
    theta, closure, _, exact = bent(0.02, even=even)
    result = lyapcuda.eigsh(closure, [theta], 2, difference="central")
    assert bool(result.converged.all())
    assert not [i for i in range(2) if is_off(result, i, exact)]
    at_first = separation_size(lyapcuda.HessianOperator(closure, [theta]).layout, "central")
    assert result.perturbation < 0.2 * at_first


def test_forward_differences_say_what_they_are_worth():
    theta, closure, _, exact = bent(0.02)
    with pytest.warns(lyapcuda.ConvergenceWarning, match="aren't good for more"):
        result = lyapcuda.eigsh(closure, [theta], difference="forward")
    assert not result.converged.any() and is_off(result, 0, exact)
    low, high = result.interval[0].tolist()
    assert low <= LEAD <= high
    assert result.gradient_evaluations == 2 + result.iterations + 4


def test_a_separation_that_was_given_is_the_scale_that_is_measured():
    theta, closure, _, exact = bent(0.02)
    result = lyapcuda.eigsh(closure, [theta], difference="central", perturbation=0.01)
    assert result.perturbation == 0.01 and is_off(result, 0, exact)
    # g(θ) twice; at twice the Δq and, as the product changes much, at half of it: no jump. And g(θ)
    # again, along which the loss has to change as it says.
    assert result.gradient_evaluations == 2 + 2 * result.iterations + 4 + 1
    assert not result.doubts


def test_kinks_are_left_at_their_scale():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 9)
    )
    x, y = torch.randn(200, 64), torch.randint(0, 9, (200,))
    with pytest.warns(lyapcuda.ConvergenceWarning, match="kinks"):
        result = lyapcuda.eigsh(
            lambda: nn.functional.cross_entropy(model(x), y),
            model.parameters(),
            tol=0.1,
            mode="difference",
        )
    assert not result.converged.any() and "kinks" in result.doubts[0]
    assert result.difference == "central" and result.perturbation > 0.01


def test_what_has_not_converged_is_not_measured():
    theta, closure, _, _ = bent(0.02)
    with pytest.warns(lyapcuda.ConvergenceWarning):
        result = lyapcuda.eigsh(closure, [theta], 2, maxiter=3, mode="difference")
    assert result.gradient_evaluations == 5 and not result.converged.any()


def test_a_second_run_starts_from_what_the_first_has_found():
    theta, closure, _, _ = bent(0.02)
    with pytest.warns(lyapcuda.ConvergenceWarning):
        forward = lyapcuda.eigsh(closure, [theta], 2, difference="forward")
    both = lyapcuda.eigsh(closure, [theta], 2, mode="difference")
    again = lyapcuda.eigsh(
        closure, [theta], 2, difference="central", perturbation=both.perturbation
    )
    assert both.iterations - forward.iterations < again.iterations
