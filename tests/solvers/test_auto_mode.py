"""mode="auto": exact products where they can be had and are right, differences elsewhere."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lyapcuda
from classifiers import classifier, clusters, mlp
from nets import Case, case
from noisy import snapshot
from operators import Counted, exact
from truths import is_off

DTYPES = [torch.float32, torch.float64]


def assert_right(result: lyapcuda.EigenResult, truth: Case) -> None:
    """Converged, and each value is the i-th."""
    assert bool(result.converged.all()) and not result.doubts
    assert not [i for i in range(len(result.eigenvalues)) if is_off(result, i, truth.eigenvalues)]


# --- exact ---------------------------------------------------------------------------------------

# By names that autograd's graph shows, and by comparisons, which it doesn't.
KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky relu": F.leaky_relu,
    "where": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
    "clamp": lambda z: z.clamp(min=0),
    "mask": lambda z: z * (z > 0),
    "max pool": lambda z: F.max_pool1d(z[:, None], 2)[:, 0],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINKS)
def test_among_kinks_products_are_exact(name, dtype):
    kept = 6 if name == "max pool" else 12
    truth = classifier(lambda: mlp(KINKS[name], kept=kept), dtype=dtype)
    params = list(truth.model.parameters())
    result = lyapcuda.eigsh(truth.closure, params, 3, "BE")
    assert (result.mode, result.difference) == ("exact", "exact")
    assert "double backward works" in result.reason
    assert_right(result, truth)
    # So is a product without a solver around it.
    operator = lyapcuda.HessianOperator(truth.closure, params)
    assert (operator.mode, operator.reason) == ("auto", "")
    v = torch.randn(operator.shape[0], dtype=dtype, generator=torch.Generator().manual_seed(0))
    product, expected = operator @ v, exact(truth.closure, params) @ v
    assert operator.mode == "exact" and "double backward works" in operator.reason
    assert torch.equal(product, expected) and torch.equal(operator @ v, expected)


def test_a_product_of_zero_decides_nothing():
    truth = case("tanh_mlp", seed=1)
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters())
    assert not (operator @ torch.zeros(operator.shape[0])).any()
    assert operator.mode == "auto"


# --- differences ---------------------------------------------------------------------------------


def gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)


class OnceGelu(torch.autograd.Function):
    """Double backward raises, or is wrong where torch doesn't notice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * gelu_slope(ctx.saved_tensors[0])


class SlopeKeepingGelu(torch.autograd.Function):
    """Keeps its slope as a constant: double backward gives another matrix, a symmetric one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(gelu_slope(x))
        return F.gelu(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Checkpointed(nn.Module):
    """The inner layers in a reentrant checkpoint, which torch.autograd.grad passes by."""

    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        net = mlp(F.gelu)
        self.inner, self.out, self.reentrant = net[:4], net[4], reentrant

    def forward(self, x):
        if not self.reentrant:
            return self.out(self.inner(x))
        # Only what an input of it asks for is differentiated.
        return self.out(checkpoint(self.inner, x.detach().requires_grad_(), use_reentrant=True))


class PlainWeightNorm(nn.Module):
    """A layer with g·v/‖v‖ by rows, written out; its parameters have the order of torch's."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        linear = nn.Linear(features, out)
        self.bias = linear.bias
        self.g = nn.Parameter(linear.weight.detach().norm(dim=1, keepdim=True))
        self.v = nn.Parameter(linear.weight.detach().clone())

    def forward(self, x):
        return x @ (self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt()).T + self.bias


def normed(new: bool, plain: bool = False) -> nn.Module:
    def layer(features: int, out: int) -> nn.Module:
        if plain:
            return PlainWeightNorm(features, out)
        if new:
            return parametrizations.weight_norm(nn.Linear(features, out))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            return nn.utils.weight_norm(nn.Linear(features, out))

    return nn.Sequential(layer(8, 12), nn.Tanh(), layer(12, 4))


def gelu() -> nn.Module:
    return mlp(F.gelu)


#: (the net, the same plainly, what the reason says)
FALLING_BACK = {
    "weight_norm": (lambda: normed(True), lambda: normed(True, plain=True), "WeightNorm"),
    "old weight_norm": (lambda: normed(False), lambda: normed(False, plain=True), "WeightNorm"),
    "once differentiable": (lambda: mlp(OnceGelu.apply), gelu, "(fails|is wrong) here"),
    "constant slope": (lambda: mlp(SlopeKeepingGelu.apply), gelu, "wrong here.*off differences"),
    "reentrant": (Checkpointed, lambda: Checkpointed(False), "Checkpoint"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FALLING_BACK)
def test_where_double_backward_fails_or_is_wrong_differences_are_taken(name, dtype):
    build, plain, reason = FALLING_BACK[name]
    truth = classifier(build, plain, dtype)
    assert_differences_are_right(truth.closure, truth, reason)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_closure_calls_backward_differences_are_taken(dtype):
    truth = classifier(gelu, dtype=dtype)

    def closure():
        loss = truth.closure()
        loss.backward()
        return loss.item()

    assert_differences_are_right(closure, truth, "called backward")


def test_where_attention_is_fused_differences_are_taken():
    truth = case("attention", seed=1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_differences_are_right(truth.closure, truth, "fails here.*derivative")


def assert_differences_are_right(closure: Callable, truth: Case, reason: str) -> None:
    params = list(truth.model.parameters())
    result = lyapcuda.eigsh(closure, params, 2)
    assert result.mode == "difference"
    assert re.search(reason, result.reason)
    assert_right(result, truth)
    # And by the first product of an operator, which says so from then on.
    operator = lyapcuda.HessianOperator(closure, params)
    u = result.eigenvectors[0]
    curvature = float(u.double() @ (operator @ u).double())
    assert operator.mode == "difference" and operator.reason
    assert curvature == pytest.approx(truth.h0, rel=5e-3)


@pytest.mark.parametrize("name", ["weight_norm", "old weight_norm", "constant slope"])
def test_exact_products_that_are_wrong_are_not_believed_where_they_are_asked_for(name):
    build, plain, _ = FALLING_BACK[name]
    truth = classifier(build, plain)
    with pytest.warns(lyapcuda.ConvergenceWarning, match="double backward is wrong"):
        result = lyapcuda.eigsh(truth.closure, truth.model.parameters(), mode="exact")
    assert result.mode == "exact" and not result.converged.any()


def test_replicas_take_differences():
    """DDP averages what backward() leaves in .grad, and no second derivative."""
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(truth.model)
        operator = lyapcuda.HessianOperator(truth.closure, model.parameters(), model=model)
        assert operator.mode == "difference" and "DistributedDataParallel" in operator.reason
        assert_right(lyapcuda.eigsh(operator), truth)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"difference": "central"}, {"perturbation": 1e-3}])
def test_options_of_differences_ask_for_them(options):
    truth = case("tanh_mlp", seed=1, dtype=torch.float64)
    operator = lyapcuda.HessianOperator(truth.closure, truth.model.parameters(), **options)
    assert (operator.mode, operator.reason) == ("difference", "a difference was asked for")
    assert lyapcuda.eigsh(operator).mode == "difference"


# --- nothing stays -------------------------------------------------------------------------------


@pytest.fixture(params=["exact", "difference"])
def noisy_solve(request, noisy):
    """A model whose every evaluation leaves traces, its closure, and where auto leads to."""
    model, closure = noisy
    if request.param == "difference":
        parametrizations.weight_norm(model.last)
    closure().backward()
    return model, closure, request.param


def test_nothing_is_changed_by_the_choice(noisy_solve):
    model, closure, mode = noisy_solve
    gradients = [p.grad for p in model.parameters()]
    before = snapshot(model)
    operator = lyapcuda.HessianOperator(closure, model.parameters())
    operator @ torch.ones(operator.shape[0])
    assert operator.mode == mode and snapshot(model) == before
    assert lyapcuda.eigsh(closure, model.parameters()).mode == mode
    assert snapshot(model) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("solver", [lyapcuda.eigsh, lyapcuda.trace])
def test_everything_is_restored_after_an_exception_in_any_evaluation(noisy_solve, solver):
    model, closure, _ = noisy_solve
    before = snapshot(model)
    calls, fails_at = 0, math.inf

    def failing():
        nonlocal calls
        calls += 1
        loss = closure()
        if calls > fails_at:
            raise ZeroDivisionError
        return loss

    solver(failing, model.parameters())
    for fails_at in range(min(calls, 9)):  # noqa: B007  (read by the closure)
        calls = 0
        with pytest.raises(ZeroDivisionError):
            solver(failing, model.parameters())
        assert snapshot(model) == before


def over_batches(act: Callable = F.relu) -> tuple[nn.Module, Callable, DataLoader]:
    """A net, a closure that takes a batch, and three batches, the last one smaller."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = mlp(act).double(), clusters(50)
    loader = DataLoader(TensorDataset(x.double(), y), batch_size=20)
    return model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), loader


def test_columns_share_a_pass_over_several_batches():
    model, loss, loader = over_batches()
    closure = Counted(loss)
    operator = lyapcuda.HessianOperator(closure, model.parameters(), data=loader)
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(operator.shape[0], 5, dtype=torch.float64, generator=generator)
    first = operator @ columns[:, 0]
    assert operator.mode == "exact"
    closure.calls = 0
    together = operator @ columns
    assert closure.calls == 3 and closure.graph() is None
    separate = torch.stack([operator @ column for column in columns.T], 1)
    assert closure.calls == 3 + 15
    torch.testing.assert_close(together, separate, rtol=1e-10, atol=1e-12)
    # And where the first column still has to decide, and over the whole at once.
    fresh = lyapcuda.HessianOperator(loss, model.parameters(), data=loader) @ columns
    torch.testing.assert_close(fresh, together, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first, together[:, 0], rtol=1e-10, atol=1e-12)
    whole = exact(lambda: loss(loader.dataset.tensors), model.parameters()) @ columns
    torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batches", [False, True])
def test_no_graph_is_held_afterwards(batches):
    model, loss, loader = over_batches(F.gelu)
    batch = loader.dataset.tensors
    closure = Counted(loss if batches else lambda: loss(batch))
    options = {"data": loader} if batches else {}
    operator = lyapcuda.HessianOperator(closure, model.parameters(), **options)
    v = torch.ones(operator.shape[0], 2, dtype=torch.float64)
    for use in (
        lambda: operator @ v[:, 0],
        lambda: operator @ v,
        lambda: lyapcuda.eigsh(operator, 2),
        lambda: lyapcuda.trace(operator, samples=6),
        lambda: lyapcuda.spectral_density(operator, draws=1, steps=4),
    ):
        kept = use()  # a result holds none either
        assert closure.calls and closure.graph() is None, kept
    with pytest.raises(ZeroDivisionError):
        handle = model[0].weight.register_hook(lambda _: 1 / 0)
        lyapcuda.eigsh(operator)
    handle.remove()
    assert closure.graph() is None
