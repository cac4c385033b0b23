"""Values that a solver could overlook: what rules them out, and nets where they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lyapcuda
from lyapcuda.basis import Basis
from lyapcuda.params.flat import FlatLayout
from lyapcuda.solvers import ritz
from lyapcuda.solvers.convergence import BlockCriterion, ConvergenceStatus, Criterion
from lyapcuda.solvers.missed import KrylovGrowth
from lyapcuda.solvers.solution import Solution
from lyapcuda.solvers.subspace_iteration import merged
from nets import case, quadratic
from truths import is_off


def run(
    matrix: np.ndarray, start: np.ndarray, steps: int, kept: int
) -> tuple[KrylovGrowth, np.ndarray]:
    """Thick-restart Lanczos in NumPy, restarted once at half of the steps; its last basis."""
    growth, basis = KrylovGrowth(), [start / np.linalg.norm(start)]
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
    criterion = Criterion(1, "LA", 1e-3, 1e-9, 1e-16, len(matrix))
    statuses = []
    for steps in (6, 12):
        growth, basis = run(matrix, vectors @ parts, steps, 3)
        found, s = np.linalg.eigh(basis[:-1] @ matrix @ basis[:-1].T)
        outside = np.abs(basis[-1] @ matrix @ basis[:-1].T @ s)
        status = criterion.judge(ritz.Ritz(found, s, outside, np.zeros_like(outside)))
        statuses += [status, criterion.without_hidden(status, found, growth)]
    early, early_looked, late, late_looked = statuses
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
def test_no_eigenvalue_is_skipped(name, which, k, difference):
    truth = case(name, seed=0)
    params = truth.model.parameters()
    result = lyapcuda.eigsh(truth.closure, params, k, which, difference=difference)
    assert bool(result.converged.all())
    assert not [i for i in range(k) if is_off(result, i, truth.eigenvalues)]


# Where a block method had called values converged that weren't the i-th: with "LM" it had lost the
# vectors of the other end (of either sign) before they could show that they lie further out, and
# where the differences' error just filled the tolerance, its own came on top.
TAKEN_FOR = [
    ("tanh_mlp", "LM", 14, torch.float32, None),
    ("tanh_mlp", "LM", 14, torch.float32, "central"),
    ("conv", "LM", 3, torch.float32, None),
    ("conv", "LM", 3, torch.float64, None),
    ("conv", "LM", 5, torch.float32, None),
    ("linear", "LA", 8, torch.float32, None),
    ("linear", "BE", 8, torch.float32, None),
]


@pytest.mark.filterwarnings("ignore::lyapcuda.ConvergenceWarning")
@pytest.mark.parametrize("method", ["lanczos", "lyapunov"])
@pytest.mark.parametrize(("name", "which", "k", "dtype", "difference"), TAKEN_FOR)
def test_no_other_value_is_taken_for_a_wanted_one(method, name, which, k, dtype, difference):
    truth = case(name, seed=40, dtype=dtype)
    result = lyapcuda.eigsh(
        truth.closure,
        truth.model.parameters(),
        k,
        which,
        method=method,
        seed=40,
        difference=difference,
        tol=1e-3 if dtype == torch.float32 else 1e-6,
    )
    off = [i for i in range(k) if is_off(result, i, truth.eigenvalues)]
    assert not [i for i in off if result.converged[i]]
    assert name == "linear" or bool(result.converged.all())


def ritz_values(values: list[float], residuals: list[float]) -> ritz.Ritz:
    """Of vectors that aren't needed."""
    m = len(values)
    return ritz.Ritz(np.array(values), np.eye(m), np.array(residuals), np.zeros(m))


def test_the_second_climb_goes_on_until_its_end_cannot_win():
    """Random vectors look small at first, and so do their residuals."""
    truth = case("gelu_mlp", seed=40)
    result = lyapcuda.eigsh(
        truth.closure, truth.model.parameters(), 8, "LM", method="lyapunov", difference="central"
    )
    assert bool(result.converged.all())
    assert not [i for i in range(8) if is_off(result, i, truth.eigenvalues)]


def grown() -> BlockCriterion:
    """Two by magnitude; what is random at first has had its time."""
    block = BlockCriterion(Criterion(2, "LM", 1e-3, 1e-9, 1e-16, 1000))
    early = block.judge(ritz_values([-4.9, -1.0, 0.0, 5.0, 6.0], [0.001, 0.2, 0.1, 1e-6, 1e-6]))
    # Nothing is known of the lower end yet, however small its residuals are.
    assert early.values.tolist() == [6.0, 5.0] and not early.done.any()
    block.judged = 8
    return block


def test_an_end_is_followed_until_it_cannot_win():
    block = grown()
    first = block.judge(ritz_values([-4.9, -1.0, 0.0, 5.0, 6.0], [0.05, 0.03, 1.0, 1e-6, 1e-6]))
    assert first.values.tolist() == [6.0, 5.0]
    # −4.9 may turn out to be −5.4, which is more than 5 and less than 6.
    assert first.done.tolist() == [True, False] == first.converged.tolist()
    assert block.members.tolist() == [4, 3, 0] and block.active.tolist() == [False, False, True]
    # Another one lay there.
    found = block.judge(ritz_values([-5.2, -4.9, 0.0, 5.0, 6.0], [1e-6, 0.02, 1.0, 1e-6, 1e-6]))
    assert found.values.tolist() == [6.0, -5.2] and found.converged.all()
    # There is none, and so the lower end needs no vector any more.
    block = grown()
    none = block.judge(ritz_values([-4.9, -1.0, 0.0, 5.0, 6.0], [0.005, 0.003, 1.0, 1e-6, 1e-6]))
    assert none.values.tolist() == [6.0, 5.0] and none.converged.all()
    assert (block.high, block.low) == (2, 0) and not block.active.any()


def test_both_errors_together_have_to_fit_the_tolerance():
    """The differences' error alone would, and so would the solver's."""
    criterion = Criterion(1, "LA", 1e-3, 6e-4, 1e-7, 1000)
    loose, tight = (
        BlockCriterion(criterion).judge(ritz_values([0.98, 1.0], [0.0, r])) for r in (25e-4, 1e-3)
    )
    # 9e-4, and r²/0.02 besides; but r may be nothing but the differences' noise.
    assert loose.limited and not loose.converged.any()
    assert tight.done.all() and tight.converged.all()


@pytest.mark.parametrize(("residual", "converged"), [(0.05, True), (0.5, False)])
def test_what_is_still_on_its_way_leaves_nothing_smaller_converged(residual, converged):
    """Two climbs, of which the second was cut short."""
    layout = FlatLayout([torch.nn.Parameter(torch.zeros(2))])
    parts = []
    for row, (value, r, done) in enumerate([(5.0, 1e-6, True), (-4.9, residual, False)]):
        vectors = Basis(layout, [torch.eye(2)[row : row + 1].clone()])
        numbers = (np.array([x]) for x in (0, value, r, r, 1e-9, done, done))
        parts.append(Solution(ConvergenceStatus(*numbers, scale=5.0), vectors, 1))
    status = merged(parts, Criterion(1, "LM", 1e-3, 1e-9, 1e-16, 2)).status
    assert status.values.tolist() == [5.0]
    assert status.done.tolist() == [converged] == status.converged.tolist()


def test_verify_gives_a_random_vector_the_time_to_show():
    """One product with it shows next to nothing of what it holds."""
    theta, closure, _ = quadratic(np.concatenate([np.linspace(-1, 1, 60), [3.0]]), seed=4)
    once, sure = (lyapcuda.eigsh(closure, [theta], verify=verify) for verify in (False, True))
    for result in (once, sure):
        assert result.eigenvalues.tolist() == pytest.approx([3.0], rel=1e-5)
        assert bool(result.converged.all())
    assert sure.iterations >= once.iterations + 6


def test_values_of_the_other_sign_are_looked_for_too():
    """By magnitude: 4.4 comes before −3.8, and a basis of k + 1 keeps none but the k largest."""
    tops = [17.0, 8.9, 8.7, 5.6, 4.4, 4.3, -3.8]
    theta, closure, _ = quadratic(np.concatenate([np.linspace(-1, 2, 200), tops]), seed=5)
    with pytest.warns(lyapcuda.ConvergenceWarning):
        result = lyapcuda.eigsh(closure, [theta], 5, "LM", ncv=6, seed=1, maxiter=25)
    right = np.isclose(result.eigenvalues, tops[:5], rtol=1e-3)
    assert right[:4].all() and not right[4]
    assert not bool(result.converged[4])
