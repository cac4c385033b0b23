"""Values that a solver could overlook: what rules them out, and nets where they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lyapcuda
from lyapcuda import ritz
from lyapcuda.hidden import Growth
from nets import case
from test_truth import quadratic
from truths import is_off


def run(matrix: np.ndarray, start: np.ndarray, steps: int, kept: int) -> tuple[Growth, np.ndarray]:
    """Thick-restart Lanczos in NumPy, restarted once at half of the steps; its last basis."""
    growth, basis = Growth(), [start / np.linalg.norm(start)]
    for step in range(steps):
        if step == steps // 2:
            v = np.stack(basis[:-1])
            values, s = np.linalg.eigh(v @ matrix @ v.T)
            s = s[:, np.argsort(-values)[:kept]]
            growth.restart(s)
            basis = [*(s.T @ v), basis[-1]]
        v = np.stack(basis)
        product = matrix @ basis[-1]
        column = v @ product
        left = product - column @ v
        left -= (v @ left) @ v
        growth.product(column, float(np.linalg.norm(left)))
        basis.append(left / np.linalg.norm(left))
    return growth, np.stack(basis)


def test_the_parts_grow_as_the_projected_matrix_says():
    rng = np.random.default_rng(1)
    spectrum = np.concatenate([np.linspace(-1, 1, 50), [1.5, 1.6, 2.5]])
    _, _, matrix = quadratic(spectrum, seed=1)
    values, vectors = np.linalg.eigh(matrix)
    start = rng.standard_normal(len(values))
    growth, basis = run(matrix, start, 20, 6)
    first = np.abs(vectors.T @ start) / np.linalg.norm(start)
    # No eigenvector's part exceeds 1: no eigenvalue is ruled out whose vector has its usual share.
    assert (growth.of(values) * first < 1 + 1e-6).all()
    # What the basis holds of each is what it is said to: here the extreme ones, nearly all.
    held = np.linalg.norm(basis @ vectors, axis=0)
    np.testing.assert_allclose((growth.of(values) * first)[-1], held[-1], rtol=1e-3)
    # Where there is no eigenvalue, it is ruled out, and ever more so.
    empty = np.array([2.0, 3.0, -1.5])
    assert (growth.of(empty) > 1e4).all()
    assert (run(matrix, start, 12, 6)[0].of(empty) < growth.of(empty)).all()


def test_what_the_start_vector_hardly_knew_is_looked_for():
    """The largest eigenvalue's vector has a twentieth of its usual part in the start."""
    rng = np.random.default_rng(2)
    _, _, matrix = quadratic(np.concatenate([np.linspace(-1, 1, 60), [2.0, 2.1]]), seed=2)
    _, vectors = np.linalg.eigh(matrix)
    parts = vectors.T @ rng.standard_normal(len(matrix))
    parts[-2:] = 3.0, 0.06
    goal = ritz.Goal(1, "LA", 1e-3, 1e-9, 1e-16, len(matrix))
    verdicts = []
    for steps in (6, 12):
        growth, basis = run(matrix, vectors @ parts, steps, 3)
        found, s = np.linalg.eigh(basis[:-1] @ matrix @ basis[:-1].T)
        outside = np.abs(basis[-1] @ matrix @ basis[:-1].T @ s)
        verdict = goal.judge(ritz.Ritz(found, s, outside, np.zeros_like(outside)))
        verdicts += [verdict, goal.without_hidden(verdict, found, growth)]
    early, early_looked, late, late_looked = verdicts
    # Residual and gap say that 2.0 is found; that nothing lies above it isn't known yet.
    assert early.values == pytest.approx([2.0], rel=1e-4) and early.done.all()
    assert not early_looked.done.any() and not early_looked.converged.any()
    assert late.values == pytest.approx([2.1], rel=1e-4) and late.done.all()
    assert late_looked.done.all() and late_looked.converged.all()


# Where values of small nets were called converged that were not the i-th, before close values were
# told apart and hidden ones looked for.
SKIPPED = [
    ("attention", "LA", 5, None),
    ("attention", "SA", 3, None),
    ("attention", "SA", 14, "central"),
    ("attention", "LM", 5, "central"),
    ("tanh_mlp", "LA", 14, "central"),
    ("gelu_mlp", "LM", 8, None),
]


@pytest.mark.parametrize(("name", "which", "k", "difference"), SKIPPED)
def test_nothing_is_skipped(name, which, k, difference):
    truth = case(name, seed=0)
    params = truth.model.parameters()
    result = lyapcuda.eigsh(truth.closure, params, k, which, difference=difference)
    assert bool(result.converged.all())
    assert not [i for i in range(k) if is_off(result, i, truth.eigenvalues)]


def test_lobpcg_residuals_are_those_of_its_vectors():
    """As a difference of squares, what orthonormality loses comes back as its square root."""
    spectrum = np.concatenate([[-6.0, -5.9], np.linspace(-0.5, 0.5, 60), [4.9, 5.0, 5.05]])
    theta, closure, _ = quadratic(spectrum, seed=3, dtype=torch.float32)
    with pytest.warns(lyapcuda.ConvergenceWarning):
        result = lyapcuda.eigsh(
            closure, [theta], 3, "BE", method="lobpcg", mode="exact", tol=1e-9, maxiter=60
        )
    operator = lyapcuda.HessianOperator(closure, [theta], mode="exact")
    for value, vector, residual in zip(
        result.eigenvalues, result.eigenvectors, result.residuals, strict=True
    ):
        left = (operator @ vector).double() - value * vector.double()
        # Rounding of the product itself: ε·‖H‖ for a few sums.
        assert float(residual) == pytest.approx(float(left.norm()), rel=0.1, abs=3e-6)


def test_verify_gives_a_random_vector_the_time_to_show():
    """One product with it shows next to nothing of what it holds."""
    theta, closure, _ = quadratic(np.concatenate([np.linspace(-1, 1, 60), [3.0]]), seed=4)
    once, sure = (lyapcuda.eigsh(closure, [theta], verify=verify) for verify in (False, True))
    for result in (once, sure):
        assert result.eigenvalues.tolist() == pytest.approx([3.0], rel=1e-5)
        assert bool(result.converged.all())
    assert sure.iterations >= once.iterations + 6
