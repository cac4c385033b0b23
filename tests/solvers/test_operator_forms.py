"""Solvers take an operator; a closure and its parameters are the short form of one."""

from __future__ import annotations

import pytest
import torch

import lyapcuda
from nets import case


@pytest.fixture
def truth():
    return case("gelu_mlp", seed=5)


def operator(truth, **options) -> lyapcuda.HessianOperator:
    return lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), **options)


def test_eigsh_of_an_operator_is_eigsh_of_its_closure(truth):
    long = lyapcuda.eigsh(operator(truth, mode="exact"), 3, "BE")
    short = lyapcuda.eigsh(truth.closure, truth.model.parameters(), 3, "BE", mode="exact")
    assert torch.equal(long.eigenvalues, short.eigenvalues)
    assert long.gradient_evaluations == short.gradient_evaluations


def test_every_solver_takes_both_forms(truth):
    params = list(truth.model.parameters())
    found = lyapcuda.eigsh(operator(truth), k=2)
    for solver, arguments, value in (
        (lyapcuda.trace, {"samples": 9}, lambda r: r.trace),
        (lyapcuda.spectral_density, {"draws": 1, "steps": 5}, lambda r: r.nodes.sum()),
        (lyapcuda.finite_scale, {"vectors": found}, lambda r: r.curvatures.sum()),
    ):
        long = solver(operator(truth), **arguments)
        short = solver(truth.closure, params=params, **arguments)
        assert float(value(long)) == float(value(short))
        assert long.gradient_evaluations == short.gradient_evaluations


@pytest.mark.filterwarnings("ignore::lyapcuda.ConvergenceWarning")
def test_solvers_leave_the_operator_as_it_is(truth):
    """A tolerance that forward differences can't keep, so that eigsh goes on with central ones."""
    h = operator(truth, mode="difference")
    before = h @ torch.ones(h.shape[0])
    perturbation = h.perturbation
    assert lyapcuda.eigsh(h, tol=1e-5).difference == "central"
    lyapcuda.finite_scale(h, lyapcuda.eigsh(h, 2))
    assert h.difference == "forward" and h.perturbation == perturbation
    assert torch.equal(h @ torch.ones(h.shape[0]), before)


def test_a_result_counts_its_own_gradients(truth):
    h = operator(truth)
    first, second = lyapcuda.eigsh(h), lyapcuda.eigsh(h)
    assert first.gradient_evaluations == second.gradient_evaluations
    spent = lyapcuda.trace(h, samples=6).gradient_evaluations
    assert h.gradient_evaluations == 2 * first.gradient_evaluations + spent


def test_differences_that_were_chosen_stay(truth):
    result = lyapcuda.eigsh(operator(truth, difference="forward"), tol=0.05)
    assert result.difference == "forward"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: lyapcuda.eigsh(t.closure), TypeError, "params is missing"),
        (lambda t: lyapcuda.trace(3, [torch.ones(2)]), TypeError, "HessianOperator"),
        (lambda t: lyapcuda.eigsh(operator(t), mode="exact"), TypeError, "mode"),
        (lambda t: lyapcuda.eigsh(t.closure, t.model.parameters(), tols=1), TypeError, "tols"),
    ],
)
def test_what_does_not_fit_is_named(truth, call, error, says):
    with pytest.raises(error, match=says):
        call(truth)
