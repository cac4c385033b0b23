"""HessianOperator over streamed batches, accumulation in the closure, subsets of the parameters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lyapcuda
import weighted_losses
from nets import case
from operators import dense, exact
from weighted_losses import ALL, COUNTS, LENGTHS, SUMS, UNCLEAR, cut


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


@pytest.fixture
def padded():
    return weighted_losses.whole()


def ones(model):
    return torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)


def over(loss, model, data, **options):
    """Hv over batches, and the operator."""
    options = {"mode": "exact", **options}
    operator = lyapcuda.HessianOperator(
        lambda b: loss(model, b), model.parameters(), data=data, **options
    )
    return operator @ ones(model), operator


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize("name", ALL)
def test_a_batch_counts_what_its_loss_averages_over(padded, name, mode):
    """H over batches of any sizes is that of all of them at once."""
    model, loss = weighted_losses.net(), ALL[name]
    expected, _ = over(loss, model, [padded], mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, operator = over(loss, model, cut(padded), mode=mode)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert operator.weights[0] > 0 and len(operator.weights) == 3
    said = {"length of its first": LENGTHS, "loss averages over": COUNTS, "is a sum": SUMS}
    kinds = [kind for word, kind in said.items() if word in operator.weighted_by]
    assert (name in SUMS) == (kinds == [SUMS]) and (kinds or "labels" in operator.weighted_by)


@pytest.mark.parametrize("name", ["half of squares", "mse, summed", "a mean, summed", "masked"])
def test_noise_does_not_hide_what_a_batch_counts(padded, name):
    plain, noisy = weighted_losses.net(), weighted_losses.net(nn.Dropout(0.5))
    _, expected = over(ALL[name], plain, cut(padded))
    state = torch.get_rng_state()
    noisy[1].bias.grad = kept = torch.ones(6, dtype=torch.float64)
    _, operator = over(ALL[name], noisy, cut(padded))
    assert operator.weights == expected.weights
    assert torch.equal(torch.get_rng_state(), state) and noisy[1].bias.grad is kept
    assert all(module.training for module in noisy.modules())


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_no_weights_explain_is_said(padded, name):
    with pytest.warns(UserWarning, match="how much each batch counts .* sizes="):
        over(UNCLEAR[name], weighted_losses.net(), cut(padded))


@pytest.mark.parametrize(
    "sizes",
    [
        [0, 2.5],
        (0, 1),
        torch.tensor([0, 3]),
        lambda b: (b["labels"] != -100).sum(),
        lambda b: float((b["labels"] != -100).any()),
        None,
    ],
)
@pytest.mark.parametrize("mode", ["exact", "difference"])
def test_a_batch_that_counts_nothing_may_be_nan(padded, sizes, mode):
    model, loss = weighted_losses.net(), COUNTS["tokens"]
    expected, _ = over(loss, model, [padded], mode=mode)
    padding = {**padded, "labels": torch.full_like(padded["labels"], -100)}
    found, operator = over(loss, model, [padding, padded], sizes=sizes, mode=mode)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert operator.weights[0] == 0.0
    with pytest.raises(ValueError, match="sizes.* zero|data: no batch counts"):
        over(
            loss,
            model,
            [padding, padding],
            sizes=None if sizes is None else (lambda b: 0),
            mode=mode,
        )


def test_sizes_are_the_weights(padded):
    model, loss, parts = weighted_losses.net(), COUNTS["tokens"], cut(padded)
    each = torch.stack([over(loss, model, [part])[0] for part in parts])
    found, operator = over(loss, model, parts, sizes=[1, 2, 5])
    torch.testing.assert_close(found, (each * torch.tensor([[1.0], [2], [5]])).sum(0) / 8)
    torch.testing.assert_close(over(loss, model, parts, sizes="sum")[0], each.sum(0))
    assert operator.weights == [1, 2, 5] and operator.weighted_by == "sizes="
    with operator.keeping_graph():  # the second product out of the graphs kept
        torch.testing.assert_close(operator.matmat(torch.eye(len(found))[:, :2].double())[:, 0],
                                   operator @ torch.eye(len(found)).double()[0])  # fmt: skip
    without_tensors, _ = over(lambda m, i: loss(m, parts[i]), model, [0, 1], sizes=[1, 1])
    torch.testing.assert_close(without_tensors, each[:2].mean(0))


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([1, 2], ValueError, "sizes: 2 numbers, but data has 3 batches"),
        ([1, -1, 1], ValueError, "sizes: -1 for batch 1"),
        (lambda b: float("nan"), ValueError, "sizes: nan for batch 0"),
        ([0, 0, 0], ValueError, "sizes: all are zero"),
        ("mean", ValueError, "sizes='mean'.*sum"),
        (3, TypeError, "sizes=3"),
        (["a", 1, 1], TypeError, "sizes: a str for batch 0"),
        (lambda b: b["ids"], TypeError, "sizes: a Tensor for batch 0"),
    ],
)
def test_wrong_sizes_are_named(padded, sizes, error, message):
    model = weighted_losses.net()
    with pytest.raises(error, match=message):
        over(COUNTS["tokens"], model, cut(padded), sizes=sizes)
    parts = cut(padded)
    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with pytest.raises(error, match=message.replace("data has", "batches has")):
        tracker.step(
            lambda b: COUNTS["tokens"](model, b), batches=parts, sizes=sizes, leave_grad=True
        )
    assert all(p.grad is None for p in model.parameters()) and int(tracker.steps) == 0


def test_sizes_without_batches_are_named():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="sizes: there are no batches.*data="):
        lyapcuda.HessianOperator(lambda: None, model.parameters(), sizes=[1])
    with pytest.raises(ValueError, match="sizes: there are no batches.*batches="):
        lyapcuda.CurvatureTracker(model.parameters()).step(lambda: None, sizes=[1])


def test_a_closure_of_full_batches_alone_is_weighted_by_lengths(padded):
    """Where a batch can't be cut in two, a sum of the user's own is left as it is, and said."""
    model, parts = weighted_losses.net(), cut(padded, ((0, 5), (5, 10)))

    def loss(m, b):
        if len(b["ids"]) != 5:
            raise RuntimeError("full batches alone")
        return SUMS["half of squares"](m, b)

    with pytest.warns(UserWarning, match="sizes="):
        _, operator = over(loss, model, parts)
    assert operator.weights == [5, 5]
    assert over(loss, model, parts, sizes="sum")[1].weights == [1, 1]


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
