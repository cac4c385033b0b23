"""GGNOperator and EmpiricalFisherOperator against dense matrices; what they leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

import lyapcuda

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(2, 6), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 1, 4, 2)).chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v).flatten(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.one(torch.tanh(self.one(x)))))


NETS = {
    "gelu": lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)),
    "relu": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
    "batchnorm": lambda: nn.Sequential(
        nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)
    ),
    "attention": Attention,
    "tied": Tied,
}


def net(name, dtype=torch.float64):
    torch.manual_seed(2)
    return NETS[name]().to(dtype)


def jacobian(function, model):
    """Of a function of nothing, by the model's parameters: (outputs, n), in the tests' own way."""
    parameters = list(model.parameters())
    outputs = function()
    rows = []
    for output in outputs.reshape(-1):
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows), outputs.detach()


def dense_ggn(model, x, loss):
    jac, out = jacobian(lambda: model(x), model)
    inner = torch.func.hessian(loss)(out).reshape(out.numel(), out.numel())
    return jac.T @ inner @ jac


def dense(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def distance(found, true):
    return float((found.double() - true.double()).norm() / true.double().norm())


LOSSES = {
    "ce": lambda out: cross_entropy(out, Y),
    "mse": lambda out: mse_loss(out, nn.functional.one_hot(Y, 3).to(out.dtype)),
    "sum": lambda out: cross_entropy(out, Y, reduction="sum"),
}


@pytest.mark.parametrize("mode", ["exact", "difference"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["gelu", "relu", "batchnorm", "tied"])
def test_the_gauss_newton_matrix(name, loss, mode):
    model = net(name)
    true = dense_ggn(model, X, LOSSES[loss])
    state = {n: v.clone() for n, v in model.state_dict().items()}
    G = lyapcuda.GGNOperator(lambda: model(X), LOSSES[loss], model.named_parameters(), mode=mode)
    found = dense(G)
    assert distance(found, true) < (1e-13 if mode == "exact" else 1e-7)
    assert distance(found, found.T) < 1e-7
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["exact", "difference"])
def test_the_empirical_fisher_matrix(mode):
    model = net("gelu")
    jac, _ = jacobian(lambda: cross_entropy(model(X), Y, reduction="none"), model)
    F = lyapcuda.EmpiricalFisherOperator(
        lambda: cross_entropy(model(X), Y, reduction="none"), model.named_parameters(), mode=mode
    )
    assert distance(dense(F), jac.T @ jac / len(X)) < (1e-13 if mode == "exact" else 1e-7)


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_over_batches_of_several_sizes_it_is_that_of_all_of_the_data(kind):
    model = net("gelu")
    batches = [(X[:13], Y[:13]), (X[13:20], Y[13:20]), (X[20:], Y[20:])]
    if kind == "ggn":
        true = dense_ggn(model, X, LOSSES["ce"])
        found = lyapcuda.GGNOperator(
            lambda batch: model(batch[0]),
            lambda out, batch: cross_entropy(out, batch[1]),
            model.named_parameters(),
            data=batches,
        )
    else:
        jac, _ = jacobian(lambda: cross_entropy(model(X), Y, reduction="none"), model)
        true = jac.T @ jac / len(X)
        found = lyapcuda.EmpiricalFisherOperator(
            lambda batch: cross_entropy(model(batch[0]), batch[1], reduction="none"),
            model.named_parameters(),
            data=batches,
        )
    assert distance(dense(found), true) < 1e-12
    assert found.weighted_by


def test_auto_takes_differences_where_double_backward_fails():
    model = net("attention", torch.float32)
    x = X.float()
    G = lyapcuda.GGNOperator(lambda: model(x), LOSSES["ce"], model.named_parameters())
    assert G.mode == "auto" and G.reason == ""
    with sdpa_kernel(SDPBackend.MATH):
        true = dense_ggn(model, x, LOSSES["ce"])
    found = dense(G)
    assert G.mode == "difference" and "double backward fails here" in G.reason
    assert distance(found, true) < 2e-3
    result = lyapcuda.eigsh(G, k=2, tol=1e-2)
    assert result.mode == "difference" and bool(result.converged.all())
    values = torch.linalg.eigvalsh(true.double())
    assert result.eigenvalues.tolist() == pytest.approx(values[-2:].flip(0).tolist(), rel=1e-2)


def test_dropout_is_one_mask_for_all_products():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    for mode in ("exact", "difference"):
        before = torch.get_rng_state()
        G = lyapcuda.GGNOperator(
            lambda: model(X), LOSSES["ce"], model.named_parameters(), mode=mode
        )
        first, second = dense(G), dense(G)
        assert torch.equal(first, second)
        assert distance(first, first.T) < 1e-7
        assert torch.equal(torch.get_rng_state(), before)


def test_solvers_take_them():
    model = net("gelu")
    G = lyapcuda.GGNOperator(lambda: model(X), LOSSES["ce"], model.named_parameters())
    true = dense_ggn(model, X, LOSSES["ce"])
    values = torch.linalg.eigvalsh(true).flip(0)
    for method in ("lanczos", "lyapunov"):
        result = lyapcuda.eigsh(G, k=3, tol=1e-4, method=method)
        assert bool(result.converged.all())
        assert result.eigenvalues.tolist() == pytest.approx(values[:3].tolist(), rel=1e-4)
    trace = lyapcuda.trace(G, samples=60)
    assert abs(trace.trace - float(true.trace())) < 4 * trace.standard_error
    density = lyapcuda.spectral_density(G, draws=40, steps=20)
    assert float(density.grid[-1]) > float(values[0]) > float(density.grid[0])
    assert float((density.nodes * density.weights).sum(1).mean()) * len(true) == pytest.approx(
        float(true.trace()), rel=0.3
    )
    with pytest.raises(TypeError, match="finite_scale is of a HessianOperator"):
        lyapcuda.finite_scale(G, result)


def test_a_loss_that_is_linear_in_the_outputs_has_none():
    model = net("gelu")
    G = lyapcuda.GGNOperator(lambda: model(X), torch.mean, model.named_parameters(), mode="exact")
    assert float(dense(G).abs().max()) == 0.0


def test_outputs_of_a_dict_and_parts_that_dont_count():
    model = net("gelu")

    def outputs():
        return {"logits": model(X), "hidden": [model[0](X)], "count": 3}

    G = lyapcuda.GGNOperator(
        outputs, lambda out: cross_entropy(out["logits"], Y), model.named_parameters()
    )
    assert distance(dense(G), dense_ggn(model, X, LOSSES["ce"])) < 1e-12


def test_outputs_that_differ_from_call_to_call_are_never_called_converged():
    model, generator = net("gelu"), torch.Generator().manual_seed(0)

    def outputs():
        rows = torch.randperm(24, generator=generator)[:12]
        return model(X[rows])

    G = lyapcuda.GGNOperator(
        outputs, lambda out: out.square().mean(), model.named_parameters(), mode="exact"
    )
    with pytest.warns(lyapcuda.ConvergenceWarning, match="two evaluations at the same"):
        result = lyapcuda.eigsh(G)
    assert not bool(result.converged.any())


def test_after_an_exception_everything_is_as_it_was():
    model = net("batchnorm")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    calls = 0

    def outputs():
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ZeroDivisionError("here")
        torch.rand(1)
        return model(X)

    state = {n: v.clone() for n, v in model.state_dict().items()}
    before = torch.get_rng_state()
    G = lyapcuda.GGNOperator(outputs, LOSSES["ce"], model.named_parameters(), mode="difference")
    with pytest.raises(ZeroDivisionError, match="here"):
        _ = G @ torch.ones(G.shape[0], dtype=torch.float64)
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"outputs": 3}, TypeError, "outputs=3"),
        ({"loss": None}, TypeError, "loss=None"),
        ({"mode": "best"}, ValueError, "mode='best'"),
        ({"perturbation": -1.0}, ValueError, "perturbation=-1.0"),
        ({"sizes": [1]}, ValueError, "sizes: there are no batches"),
        ({"select": "nothing*"}, ValueError, "select: no parameter's name matches"),
        ({"exclude": "*"}, ValueError, "exclude='\\*': no parameter is left"),
        ({"params": []}, ValueError, "params"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, error, words):
    model = net("gelu")
    arguments = {"outputs": lambda: model(X), "loss": LOSSES["ce"]}
    arguments |= {"params": model.named_parameters(), **change}
    with pytest.raises(error, match=words):
        lyapcuda.GGNOperator(**arguments)


def test_losses_that_arent_one_a_sample_are_named():
    model = net("gelu")
    F = lyapcuda.EmpiricalFisherOperator(
        lambda: cross_entropy(model(X), Y), model.named_parameters()
    )
    with pytest.raises(ValueError, match="one loss a sample"):
        _ = F @ torch.ones(F.shape[0], dtype=torch.float64)


# --- outputs and modules of other kinds -----------------------------------------------------------


def squared(out):
    return (out - 0.3).square().mean()


@pytest.mark.parametrize("mode", ["exact", "difference", "auto"])
def test_outputs_that_depend_on_each_other_count_once(mode):
    model = net("gelu")
    true = dense_ggn(model, X, squared)

    def twice():
        out = model(X)
        return {"one": out, "again": out}

    def with_hidden():
        hidden = model[:2](X)
        return model[2](hidden), hidden, Y, X  # and what has no gradient

    def both(found):
        return squared(0.5 * found["one"] + 0.5 * found["again"])

    named = dict(model.named_parameters()).items()
    for outputs, loss in ((twice, both), (with_hidden, lambda found: squared(found[0]))):
        G = lyapcuda.GGNOperator(outputs, loss, named, mode=mode)
        assert distance(dense(G), true) < 1e-6


def test_a_loss_may_write_to_the_outputs():
    model = net("gelu")

    def loss(out):
        out /= 0.5
        return squared(out)

    true = dense_ggn(model, X, lambda out: squared(out / 0.5))
    for mode in ("exact", "difference", "auto"):
        G = lyapcuda.GGNOperator(lambda: model(X), loss, model.named_parameters(), mode=mode)
        assert distance(dense(G), true) < 1e-6


class Detached(torch.autograd.Function):
    """Double backward takes it for a constant."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach().clone()


def test_exact_products_of_zero_arent_believed_where_differences_say_otherwise():
    model = net("gelu")
    G = lyapcuda.GGNOperator(lambda: Detached.apply(model(X)), squared, model.named_parameters())
    zero = G @ torch.zeros(G.shape[0], dtype=torch.float64)
    assert float(zero.abs().max()) == 0.0 and G.mode == "auto"  # that says nothing
    assert distance(dense(G), dense_ggn(model, X, squared)) < 1e-6
    assert G.mode == "difference"


class Remembers(nn.Module):
    """Its buffer changes in place at each call, and autograd saves it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)
        self.register_buffer("state", torch.ones(6))

    def forward(self, x):
        with torch.no_grad():
            self.state.copy_(0.5 * self.state + x.mean())
        return self.two(torch.tanh(self.one(x)) * self.state)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("kind", ["hessian", "exact", "difference", "auto"])
def test_a_buffer_that_the_graph_has_saved(kind, batches):
    """Kept graphs see what their own forward pass left there, not what is put back after it."""
    torch.manual_seed(2)
    model = Remembers().double()
    state = model.state.clone()
    rows = list(zip(X.chunk(batches), Y.chunk(batches), strict=True))
    named = dict(model.named_parameters()).items()
    if kind == "hessian":
        operator = lyapcuda.HessianOperator(
            lambda b: cross_entropy(model(b[0]), b[1]), named, data=rows, mode="exact"
        )
    else:
        operator = lyapcuda.GGNOperator(
            lambda b: model(b[0]),
            lambda out, b: cross_entropy(out, b[1]),
            named,
            data=rows,
            mode=kind,
        )
    eye = torch.eye(operator.shape[0], dtype=torch.float64)
    apart = torch.stack([operator @ column for column in eye], 1)
    if kind != "hessian":
        true = 0.0
        for x, y in rows:  # as the batches follow each other
            true = true + dense_ggn(model, x, lambda out, y=y: cross_entropy(out, y)) / batches
        model.state.copy_(state)
        assert distance(apart, true) < 1e-6
    assert distance(dense(operator), apart) < 1e-6
    assert distance(apart, apart.T) < 1e-6
    assert torch.equal(model.state, state)


def test_an_outer_autocast_is_no_other_function_at_the_other_side():
    model = net("gelu", torch.float32)
    x = X.float()
    true = dense_ggn(model, x, squared)
    with torch.autocast("cpu", torch.bfloat16):
        G = lyapcuda.GGNOperator(
            lambda: model(x), squared, model.named_parameters(), mode="difference"
        )
        v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(3))
        assert distance(G @ v, true @ v) < 0.3


def test_16_bits_take_the_finer_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3)).bfloat16()
    x = torch.randn(32, 3).bfloat16()
    G = lyapcuda.GGNOperator(lambda: model(x), squared, model.named_parameters())
    _ = G @ torch.randn(G.shape[0], generator=torch.Generator().manual_seed(3))
    assert G.mode == "exact"


@pytest.mark.parametrize(
    ("outputs", "loss", "error", "words"),
    [
        ("other", squared, ValueError, "none of them depends on the parameters"),
        ("complex", lambda out: out.abs().mean(), TypeError, "view_as_real"),
        ("dataclass", lambda out: out.a.mean(), TypeError, "is a dataclass"),
        ("loss", lambda out: out["loss"], ValueError, "one of the outputs as it is"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "difference", "auto"])
def test_outputs_that_cant_be_taken_are_named(outputs, loss, error, words, mode):
    from dataclasses import make_dataclass

    model, other = net("gelu"), net("relu")
    made = {
        "other": lambda: other(X),
        "complex": lambda: torch.fft.rfft(model(X)),
        "dataclass": lambda: make_dataclass("Out", ["a"])(model(X)),
        "loss": lambda: {"loss": cross_entropy(model(X), Y)},
    }[outputs]
    G = lyapcuda.GGNOperator(made, loss, model.named_parameters(), mode=mode)
    with pytest.raises(error, match=words):
        _ = G @ torch.ones(G.shape[0], dtype=torch.float64)


def test_doubts_go_with_what_they_were_about():
    model, generator = net("gelu"), torch.Generator().manual_seed(0)
    draws = True

    def outputs():
        rows = torch.randperm(24, generator=generator)[:12] if draws else slice(12)
        return model(X[rows])

    G = lyapcuda.GGNOperator(outputs, squared, model.named_parameters(), mode="exact")
    ones = torch.ones(G.shape[0], dtype=torch.float64)
    _ = G @ ones
    assert G.doubts
    draws = False
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    _ = G @ ones
    assert not G.doubts
