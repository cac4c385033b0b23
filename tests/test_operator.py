"""HessianOperator: the Hessian from gradient differences, and nothing of the user's disturbed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lyapcuda
from lyapcuda.evaluate import at_a_copy
from nets import NAMES, case
from test_evaluate import Attention, Noisy, Square, WrittenOutAttention, snapshot


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def exact(closure, params, **options):
    return lyapcuda.HessianOperator(closure, params, mode="exact", **options)


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
    assert operator.gradient_evaluations == per * columns.shape[1] + 1


def test_exact_products_are_the_dense_hessian():
    truth = case("gelu_mlp", 2, torch.float64)
    matrix = dense(exact(truth.closure, truth.model.parameters()))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        torch.linalg.eigvalsh((matrix + matrix.T) / 2), truth.eigenvalues, rtol=0, atol=1e-13
    )


def test_interface():
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


@pytest.fixture
def noisy():
    torch.manual_seed(0)
    model = Noisy()
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


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


def test_at_a_copy_is_told():
    truth = case("linear", 1)
    seen = []

    def closure():
        seen.append(at_a_copy())
        return truth.closure()

    operator = lyapcuda.HessianOperator(closure, truth.model.parameters())
    operator @ torch.ones(operator.shape[0])
    assert seen == [False, True]


# --- streamed batches, accumulation, subsets -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_streamed_batches_are_the_full_batch(dtype, difference):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    x, y = torch.randn(50, 5, dtype=dtype), torch.randint(0, 3, (50,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)

    def loss(batch):
        return nn.functional.cross_entropy(model(batch[0]).double(), batch[1])

    options = dict(difference=difference, perturbation=None if dtype == torch.float64 else 0.3)
    state = torch.get_rng_state()
    streamed = lyapcuda.HessianOperator(loss, model.parameters(), data=loader, **options)
    whole = lyapcuda.HessianOperator(lambda: loss((x, y)), model.parameters(), **options)
    v = torch.randn(whole.shape[0], dtype=whole.dtype, generator=torch.Generator().manual_seed(1))
    tol = 1e-6 if dtype == torch.float64 else 0.1
    expected = whole @ v
    assert float((streamed @ v - expected).norm() / expected.norm()) < tol
    assert torch.equal(torch.get_rng_state(), state)
    per = {"forward": 1, "central": 2}[difference]
    assert streamed.gradient_evaluations == whole.gradient_evaluations == per + 1
    if dtype == torch.float64:
        once = lyapcuda.HessianOperator(loss, model.parameters(), data=loader, mode="exact")
        assert float((once @ v - expected).norm() / expected.norm()) < 1e-6


def test_a_loaders_own_generator_is_rewound():
    """BatchNorm: the loss depends on which samples share a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = TensorDataset(torch.randn(48, 5).double(), torch.randint(0, 3, (48,)))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    state = generator.get_state()
    operator = lyapcuda.HessianOperator(
        lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        model.parameters(),
        data=loader,
        difference="central",
    )
    matrix = dense(operator)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-8)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("kind", ["dict", "list", "tensor"])
def test_batches_of_any_kind(kind):
    model = nn.Linear(3, 1).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    make = {
        "dict": lambda t: {"id": "a", "x": t},
        "list": lambda t: ["a", [t]],
        "tensor": lambda t: t,
    }
    read = {"dict": lambda b: b["x"], "list": lambda b: b[1][0], "tensor": lambda b: b}[kind]
    operator = lyapcuda.HessianOperator(
        lambda batch: model(read(batch)).square().mean(),
        model.parameters(),
        data=[make[kind](x[:7]), make[kind](x[7:])],
    )
    whole = lyapcuda.HessianOperator(lambda: model(x).square().mean(), model.parameters())
    v = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(operator @ v, whole @ v, rtol=1e-6, atol=1e-6)


def test_bad_data():
    model = nn.Linear(3, 1)
    x = torch.randn(10, 3)

    def closure(batch):
        return model(batch).square().mean()

    def operator(data):
        return lyapcuda.HessianOperator(closure, model.parameters(), data=data)

    with pytest.raises(ValueError, match="generator can be consumed only once"):
        operator(batch for batch in [x])
    with pytest.raises(TypeError, match="data=3"):
        operator(3)
    for data, message in [
        ([], "no batch"),
        ([{"a": "no tensor"}], "no tensor"),
        ([torch.tensor(1.0)], "no tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            operator(data) @ torch.ones(4)

    class Shrinking:
        left = 3

        def __iter__(self):
            self.left -= 1
            return iter([x] * self.left)

    with pytest.raises(ValueError, match="10 samples in this pass, 20 in the first"):
        operator(Shrinking()) @ torch.ones(4)


def test_accumulation_inside_the_closure():
    truth = case("tanh_mlp", 1, torch.float64)

    def accumulating():
        loss = 0.0
        for _ in range(4):
            part = truth.closure() / 4
            part.backward()
            loss += part.item()
        return loss

    v = torch.ones(92, dtype=torch.float64)
    params = list(truth.model.parameters())
    expected = exact(truth.closure, params) @ v
    found = lyapcuda.HessianOperator(accumulating, params, difference="central") @ v
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="called backward"):
        exact(accumulating, params) @ v


def test_select_by_name():
    truth = case("gelu_mlp", 1, torch.float64)
    names = [n for n, _ in truth.model.named_parameters()]
    v = torch.ones(12 * 12 + 12, dtype=torch.float64)
    chosen = [p for n, p in truth.model.named_parameters() if n.startswith("2.")]
    expected = exact(truth.closure, chosen) @ v
    for select in ("2.*", ["2.weight", "2.b*"]):
        operator = lyapcuda.HessianOperator(
            truth.closure, truth.model.named_parameters(), select=select, difference="central"
        )
        torch.testing.assert_close(operator @ v, expected, rtol=1e-8, atol=1e-8)
    assert len(names) == 6
    grouped = [{"params": list(truth.model.named_parameters()), "weight_decay": 0.5}]
    operator = exact(truth.closure, grouped, select="2.*")
    torch.testing.assert_close(operator @ v, expected + 0.5 * v)
    with pytest.raises(ValueError, match=r"'7\.\*'"):
        lyapcuda.HessianOperator(
            truth.closure, truth.model.named_parameters(), select=["2.*", "7.*"]
        )
    with pytest.raises(TypeError, match="needs names"):
        lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), select="2.*")


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
        (dict(model=3), TypeError, "int"),
    ],
)
def test_bad_arguments(options, error, message):
    truth = case("linear", 1)
    with pytest.raises(error, match=message):
        lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), **options)
    with pytest.raises(TypeError, match="closure=3"):
        lyapcuda.HessianOperator(3, truth.model.parameters())


def test_a_small_perturbation_warns():
    truth = case("linear", 1)
    with pytest.warns(UserWarning, match="perturbation=1e-07 is small"):
        lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), perturbation=1e-7)


def test_kinks_are_seen():
    smooth, kinked = nn.GELU(), nn.ReLU()
    sizes = []
    for activation in (smooth, kinked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 2))
        x = torch.randn(10, 6)
        operator = lyapcuda.HessianOperator(
            lambda m=model, x=x: m(x).square().mean(), model.parameters()
        )
        operator @ torch.ones(operator.shape[0])
        assert operator.kinked is (activation is kinked)
        sizes.append(operator.perturbation)
    assert sizes[1] > 10 * sizes[0]


def test_random_states_of_python_and_numpy_stay():
    truth = case("linear", 1)
    states = random.getstate(), np.random.get_state()[1].tobytes()
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters())
    operator @ torch.ones(operator.shape[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states
