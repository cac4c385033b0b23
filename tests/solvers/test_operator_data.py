"""HessianOperator over streamed batches, accumulation in the closure, subsets of the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lyapcuda
from nets import case
from operators import dense, exact


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
    assert streamed.gradient_evaluations == whole.gradient_evaluations == per + 2
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


def test_data_that_cant_be_streamed_is_named():
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
    with pytest.raises(RuntimeError, match="called backward"):
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
