"""HessianOperator: the Hessian from gradient differences, and nothing of the user's disturbed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.objective.pointing import at_a_copy
from nets import NAMES, Attention, Square, WrittenOutAttention, case
from noisy import snapshot
from operators import Counted, dense, exact


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "difference", "tol"),
    [
        (torch.float32, "forward", 5e-3),
        (torch.float32, "central", 5e-4),
        (torch.float64, "forward", 1e-6),
        (torch.float64, "central", 1e-9),
    ],
)
def test_the_dense_hessian(name, dtype, difference, tol):
    truth = case(name, 1, dtype)
    params = list(truth.model.named_parameters())
    operator = lyapcuda.HessianOperator(truth.closure, params, difference=difference)
    columns = torch.eye(operator.shape[0], dtype=dtype)[:, ::7]
    found = operator @ columns
    expected = exact(truth.closure, params) @ columns
    # Relative to ‖H‖: what rounding leaves of a column doesn't shrink with the column.
    worst = (found - expected).double().norm(dim=0).max()
    assert float(worst) < tol * float(truth.eigenvalues.abs().max())
    per = {"forward": 1, "central": 2}[difference]
    assert operator.gradient_evaluations == per * columns.shape[1] + 2


def test_exact_products_are_the_dense_hessian():
    truth = case("gelu_mlp", 2, torch.float64)
    matrix = dense(exact(truth.closure, truth.model.parameters()))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        torch.linalg.eigvalsh((matrix + matrix.T) / 2), truth.eigenvalues, rtol=0, atol=1e-13
    )


@pytest.fixture
def counted():
    truth = case("gelu_mlp", 2, torch.float64)
    return Counted(truth.closure), list(truth.model.parameters())


def test_exact_products_share_one_graph_where_they_are_asked_to(counted):
    closure, params = counted
    operator = exact(closure, params)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    alone = operator @ v
    assert closure.calls == 1 and closure.graph() is None
    with operator.keeping_graph():
        assert torch.equal(operator @ v, alone) and torch.equal(operator @ v, alone)
        assert closure.calls == 2 and closure.graph() is not None
        before = params[0].detach().clone()
        with torch.no_grad():
            params[0].mul_(1.5)
        moved = operator @ v
        assert closure.calls == 3
    assert closure.graph() is None
    torch.testing.assert_close(moved, exact(closure.closure, params) @ v)
    assert not torch.allclose(moved, alone) and torch.equal(params[0], 1.5 * before)


def test_the_graph_of_exact_products_is_gone_after_an_exception(counted):
    closure, params = counted
    operator = exact(closure, params)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    handle = None
    with pytest.raises(ZeroDivisionError), operator.keeping_graph():
        operator @ v
        handle = params[0].register_hook(lambda _: 1 / 0)
        operator @ v
    handle.remove()
    assert closure.calls == 1 and closure.graph() is None
    assert all(p.grad is None for p in params)


def test_eigsh_computes_the_loss_once_for_all_exact_products(counted):
    closure, params = counted
    result = lyapcuda.eigsh(closure, params, 2, mode="exact", tol=1e-6)
    # And once more at θ and beside it, to see whether a difference agrees; and the loss alone on
    # both sides, to see whether it changes as its gradient says.
    assert closure.calls == 1 + 2 + 2 and closure.graph() is None
    assert result.gradient_evaluations == 2 * result.iterations + 2
    other = lyapcuda.eigsh(closure, params, 2, difference="central", tol=1e-6)
    torch.testing.assert_close(result.eigenvalues, other.eigenvalues, rtol=1e-6, atol=0)


def test_the_operator_is_square_linear_and_takes_vectors_and_matrices():
    truth = case("linear", 1, torch.float64)
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters())
    n = operator.shape[0]
    assert operator.shape == (n, n) and operator.dtype == torch.float64
    v = torch.randn(n, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(v), operator @ v, rtol=0, atol=0)
    torch.testing.assert_close(3 * (operator @ v), operator @ (3 * v), rtol=1e-7, atol=1e-7)
    assert (operator @ torch.zeros(n)).tolist() == [0.0] * n
    assert operator.matmat(torch.zeros(n, 0)).shape == (n, 0)
    with pytest.raises(ValueError, match=r"v: .*\(24,\)"):
        operator.matvec(torch.zeros(n + 1))
    with pytest.raises(ValueError, match="matrix"):
        operator.matmat(v)


def test_scipy_eigsh_over_the_operator():
    from scipy.sparse.linalg import LinearOperator, eigsh

    truth = case("tanh_mlp", 3, torch.float64)
    operator = lyapcuda.HessianOperator(
        truth.closure, truth.model.parameters(), difference="central"
    )
    linear = operator.to_scipy()
    assert isinstance(linear, LinearOperator) and linear.shape == operator.shape
    found = eigsh(linear, k=3, which="LA", tol=1e-6, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), truth.eigenvalues[-3:].numpy(), rtol=1e-6)


def test_groups_of_other_dtypes_and_weight_decays_in_the_users_order():
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6), nn.Linear(6, 2).double()
    x, y = torch.randn(20, 4), torch.randn(20, 2, dtype=torch.float64)

    def closure():
        return nn.functional.mse_loss(last(torch.tanh(first(x)).double()), y)

    params = [
        {"params": [first.weight], "weight_decay": 0.1},
        {"params": list(last.parameters())},
        {"params": [first.bias], "weight_decay": 0.3},
    ]
    operator = lyapcuda.HessianOperator(closure, params, difference="central")
    assert operator.dtype == torch.float64
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    plain = exact(closure, [first.weight, *last.parameters(), first.bias]) @ v
    decay = torch.cat([torch.full((24,), 0.1), torch.zeros(14), torch.full((6,), 0.3)])
    torch.testing.assert_close(exact(closure, params) @ v, plain + decay * v)
    torch.testing.assert_close(operator @ v, plain + decay * v, rtol=1e-3, atol=1e-3)


# --- one fixed function --------------------------------------------------------------------------


def test_dropout_and_batchnorm_give_one_symmetric_operator():
    torch.manual_seed(1)
    layers = [nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.1), nn.Linear(10, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 3, (32,))

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    operator = lyapcuda.HessianOperator(closure, model.parameters(), difference="central")
    reference = exact(closure, model.parameters())  # of the same random state
    first = dense(operator)
    torch.rand(5)  # the user's random numbers go on: the mask of this operator doesn't
    torch.testing.assert_close(first, dense(operator), rtol=0, atol=0)
    torch.testing.assert_close(first, first.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(first, dense(reference), rtol=0, atol=1e-8)
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("mode", ["forward", "central", "exact"])
def test_no_trace_is_left(noisy, mode):
    model, closure = noisy
    closure().backward()
    gradients = [p.grad for p in model.parameters()]
    options = dict(mode="exact") if mode == "exact" else dict(difference=mode)
    before = snapshot(model)
    operator = lyapcuda.HessianOperator(closure, model.parameters(), **options)
    for _ in range(2):
        operator @ torch.ones(operator.shape[0])
    assert snapshot(model) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("mode", ["forward", "central", "exact"])
@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_exception_anywhere(noisy, fails_at, mode, error):
    model, closure = noisy
    closure().backward()
    options = dict(mode="exact") if mode == "exact" else dict(difference=mode)
    points = 0

    def reach():
        nonlocal points
        points += 1
        if points == fails_at + 1:
            raise error("here")

    handles = [m.register_forward_hook(lambda *_: reach()) for m in (model.norm, model.last)]
    handles += [p.register_hook(lambda _: reach()) for p in (model.first.weight, model.last.bias)]
    before = snapshot(model)
    operator = lyapcuda.HessianOperator(closure, model.parameters(), **options)
    with pytest.raises(error):
        operator @ torch.ones(operator.shape[0])
        operator @ torch.ones(operator.shape[0])  # an exact product has four points only
    assert points == fails_at + 1
    assert snapshot(model) == before
    for handle in handles:
        handle.remove()
    twin = lyapcuda.HessianOperator(closure, model.parameters(), **options)
    v = torch.ones(operator.shape[0])
    assert torch.equal(operator @ v, twin @ v)


def test_the_gradient_is_taken_again_where_the_parameters_have_moved():
    truth = case("tanh_mlp", 1, torch.float64)
    params = list(truth.model.parameters())
    operator = lyapcuda.HessianOperator(truth.closure, params)
    v = torch.ones(operator.shape[0], dtype=torch.float64)
    operator @ v
    with torch.no_grad():
        params[0].mul_(1.5)
    expected = exact(truth.closure, params) @ v
    torch.testing.assert_close(operator @ v, expected, rtol=1e-6, atol=1e-6)


def test_a_closure_is_told_that_it_is_at_a_copy():
    truth = case("linear", 1)
    seen = []

    def closure():
        seen.append(at_a_copy())
        return truth.closure()

    operator = lyapcuda.HessianOperator(closure, truth.model.parameters(), mode="difference")
    operator @ torch.ones(operator.shape[0])
    assert seen == [False, False, True]


# --- where exact products fail -------------------------------------------------------------------


def test_beside_a_once_differentiable_function():
    """There an exact product is silently wrong; a difference of gradients is right to 1e-10."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 1).double()
    params = [*first.parameters(), *last.parameters()]
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)

    def opaque():
        return nn.functional.mse_loss(last(Square.apply(first(x))), y) + sum(
            p.square().sum() for p in params
        )

    def plain():
        return nn.functional.mse_loss(last(first(x).square()), y) + sum(
            p.square().sum() for p in params
        )

    v = torch.randn(len(params[0]) * 4 + 6 + 7, dtype=torch.float64)
    truth = exact(plain, params) @ v
    difference = lyapcuda.HessianOperator(opaque, params, difference="central") @ v
    assert float((difference - truth).norm() / truth.norm()) < 1e-10
    try:
        wrong = exact(opaque, params) @ v
    except RuntimeError:
        return
    assert float((wrong - truth).norm() / truth.norm()) > 0.01


def test_scaled_dot_product_attention():
    torch.manual_seed(0)
    model, twin = Attention().double(), WrittenOutAttention().double()
    twin.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 5, 8, dtype=torch.float64), torch.randint(0, 3, (8,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        closure = lambda: nn.functional.cross_entropy(model(x), y)  # noqa: E731
        operator = lyapcuda.HessianOperator(closure, model.parameters(), difference="central")
        v = torch.ones(operator.shape[0], dtype=torch.float64)
        found = operator @ v
        with pytest.raises(RuntimeError, match="mode=exact.*derivative.*mode='difference'"):
            exact(closure, model.parameters()) @ v
    expected = exact(lambda: nn.functional.cross_entropy(twin(x), y), twin.parameters()) @ v
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(mode="magic"), ValueError, "mode='magic'"),
        (dict(difference="backward"), ValueError, "difference='backward'"),
        (dict(perturbation=0.0), ValueError, r"perturbation=0\.0"),
        (dict(perturbation=True), ValueError, "perturbation=True"),
        (dict(weight_decay=-1.0), ValueError, r"weight_decay=-1\.0"),
        (dict(model=3), TypeError, "model=3"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    truth = case("linear", 1)
    with pytest.raises(error, match=message):
        lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), **options)
    with pytest.raises(TypeError, match="closure=3"):
        lyapcuda.HessianOperator(3, truth.model.parameters())


def test_a_small_perturbation_warns():
    truth = case("linear", 1)
    with pytest.warns(UserWarning, match="perturbation=1e-07 is small"):
        lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), perturbation=1e-7)


def test_kinks_are_seen_by_what_they_do():
    """A hard sigmoid far inside of its linear part has the name of a kink, but is none."""
    sizes = []
    for activation, scale in ((nn.GELU(), 1.0), (nn.Hardsigmoid(), 0.1), (nn.ReLU(), 1.0)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 50), activation, nn.Linear(50, 50), activation, nn.Linear(50, 9)
        )
        x, y = scale * torch.randn(200, 64), torch.randint(0, 9, (200,))
        operator = lyapcuda.HessianOperator(
            lambda m=model, x=x, y=y: nn.functional.cross_entropy(m(x), y),
            model.parameters(),
            mode="difference",
        )
        operator @ torch.ones(operator.shape[0])
        assert bool(operator.kinked) is isinstance(activation, nn.ReLU)
        sizes.append(operator.perturbation)
    assert sizes[2] > 10 * max(sizes[:2])


def test_random_states_of_python_and_numpy_stay():
    truth = case("linear", 1)
    states = random.getstate(), np.random.get_state()[1].tobytes()
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters())
    operator @ torch.ones(operator.shape[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states
