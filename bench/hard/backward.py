"""Losses whose backward pass hides something, or isn't that of the loss; and smooth ones beside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from classifiers import Act
from hard.problem import (
    Asks,
    Family,
    Loss,
    Problem,
    clusters,
    dense_hessian,
    eigenvalues,
    many,
    mlp,
    supervised,
)

_CLIMBS: Asks = (("LA", 1), ("BE", 3))
Build = Callable[[], nn.Module]

# --- functions with a backward of their own ------------------------------------------------------


class OwnRelu(torch.autograd.Function):
    """Twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class OnceRelu(OwnRelu):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * (-x * x / 2).exp() / (2 * torch.pi) ** 0.5


class OnceGelu(torch.autograd.Function):
    """Double backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * _gelu_slope(ctx.saved_tensors[0])


class SlopeKeepingGelu(torch.autograd.Function):
    """Keeps its slope as a constant: double backward is wrong, and nothing says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(_gelu_slope(x))
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Checkpointed(nn.Module):
    def __init__(self, act: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 12), act)
        self.out = nn.Linear(12, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        # A reentrant one differentiates only what an input of it asks for.
        x = x.detach().requires_grad_()
        return self.out(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def _plain_relu(z: Tensor) -> Tensor:
    return z * (z > 0).to(z.dtype)


def _plain_gelu(z: Tensor) -> Tensor:
    return z * torch.special.ndtr(z)


def _plain_softplus(z: Tensor) -> Tensor:
    return torch.log(1 + z.exp())


def _net(name: str, kind: str, build: Build, plain: Build, climbs: Asks = ()) -> Family:
    return Family(name, kind, lambda s, d: supervised(s, d, build, plain, data=many), climbs=climbs)


def _activation(
    name: str,
    kind: str,
    act: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
    climbs: Asks = (),
) -> Family:
    return _net(name, kind, lambda: mlp(lambda: Act(act)), lambda: mlp(lambda: Act(plain)), climbs)


# --- weight_norm ----------------------------------------------------------------------------------


class PlainWeightNorm(nn.Module):
    """A layer with g·v/‖v‖ by rows. Its parameters have the order of torch's (old, or new)."""

    def __init__(self, features: int, out: int, new: bool) -> None:
        super().__init__()
        linear = nn.Linear(features, out)
        length = linear.weight.detach().norm(dim=1, keepdim=True)
        self.bias = linear.bias
        self.g, self.v = nn.Parameter(length), nn.Parameter(linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.v / self.v.square().sum(1, keepdim=True).sqrt()
        return x @ (self.g * rows).T + self.bias


def _weight_norm(name: str, new: bool, act: Callable[[], nn.Module]) -> Family:
    def norm(layer: nn.Module) -> nn.Module:
        if new:
            return parametrizations.weight_norm(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            return nn.utils.weight_norm(layer)

    def layers(layer: Callable[[int, int], nn.Module]) -> nn.Module:
        return nn.Sequential(layer(8, 12), act(), layer(12, 12), act(), layer(12, 4))

    return _net(
        name,
        "wrong double backward",
        lambda: layers(lambda a, b: norm(nn.Linear(a, b))),
        lambda: layers(lambda a, b: PlainWeightNorm(a, b, new)),
    )


# --- no Hessian of the loss -----------------------------------------------------------------------


def _sign_through(z: Tensor) -> Tensor:
    """sign(z), with the gradient of hardtanh."""
    clipped = z.clamp(-1, 1)
    return clipped + (z.sign() - clipped).detach()


def _binary(seed: int, dtype: torch.dtype) -> Problem:
    problem = supervised(seed, dtype, lambda: mlp(lambda: Act(_sign_through)))
    problem.exact_truth, problem.truth = problem.truth, None
    return problem


def _rounded(seed: int, dtype: torch.dtype) -> Problem:
    """Weights of four bits or so, biases as they are."""
    problem = supervised(seed, dtype, lambda: mlp(nn.Tanh))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(nn.Tanh).to(dtype)
        x, y = clusters(64)
    with torch.no_grad():
        for p, q in zip(model.parameters(), problem.params, strict=True):
            p.copy_(q)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        values = {
            name: p + ((8 * p).round() / 8 - p).detach() if p.dim() == 2 else p
            for name, p in net.named_parameters()
        }
        return F.cross_entropy(functional_call(net, values, (x,)), y)

    def exact_truth() -> Tensor:
        twin = mlp(nn.Tanh).double()
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_((8 * q.double()).round() / 8 if q.dim() == 2 else q)
        plain = lambda: F.cross_entropy(twin(x.double()), y)  # noqa: E731
        return eigenvalues(dense_hessian(plain, twin.parameters()))

    inputs = x.to(dtype)
    return Problem(list(model.parameters()), lambda: loss(model, inputs), None, exact_truth)


def _bootstrapped(seed: int, dtype: torch.dtype) -> Problem:
    """A value net beside a reward and 0.9 of its own next value, which is held constant."""

    def td(out: Tensor, y: Tensor) -> Tensor:
        target = (out.roll(1, 0).max(1).values * 0.9 + (y == 0)).detach()
        return F.mse_loss(out.gather(1, y[:, None]).squeeze(1), target)

    problem = supervised(seed, dtype, lambda: mlp(nn.Tanh), criterion=td)
    problem.exact_truth, problem.truth = problem.truth, None
    return problem


# --- closures that return no graph ----------------------------------------------------------------


def _returns_float(model: nn.Module, loss: Loss) -> Callable[[], Any]:
    def closure() -> float:
        model.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    return closure


def _returns_detached(model: nn.Module, loss: Loss) -> Callable[[], Any]:
    def closure() -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return closure


def _without_graph(name: str, closure: Callable, act: Callable, plain: Callable) -> Family:
    def make(seed: int, dtype: torch.dtype) -> Problem:
        return supervised(
            seed,
            dtype,
            lambda: mlp(lambda: Act(act)),
            lambda: mlp(lambda: Act(plain)),
            data=many,
            closure=closure,
        )

    return Family(name, "hidden backward", make)


_HIDDEN, _WRONG, _NONE = "hidden backward", "wrong double backward", "no Hessian"
FAMILIES = [
    _activation("GELU", "smooth", F.gelu, _plain_gelu, _CLIMBS),
    _activation("tanh", "smooth", torch.tanh, lambda z: 1 - 2 / (1 + (2 * z).exp())),
    _activation("softplus", "smooth", F.softplus, _plain_softplus),
    *(
        _net(
            f"{name} checkpointed" + ", reentrant" * reentrant,
            _HIDDEN,
            lambda act=act, reentrant=reentrant: Checkpointed(act(), reentrant),
            lambda act=act: nn.Sequential(
                nn.Linear(8, 12), act(), nn.Linear(12, 12), act(), nn.Linear(12, 4)
            ),
        )
        for name, act in (("ReLU", nn.ReLU), ("GELU", nn.GELU))
        for reentrant in (False, True)
    ),
    _activation("ReLU as a Function", _HIDDEN, OwnRelu.apply, _plain_relu),
    _activation("ReLU, once_differentiable", _HIDDEN, OnceRelu.apply, _plain_relu),
    _without_graph("ReLU, closure returns a float", _returns_float, F.relu, _plain_relu),
    _without_graph("GELU, closure returns a float", _returns_float, F.gelu, _plain_gelu),
    _without_graph("ReLU, returns loss.detach()", _returns_detached, F.relu, _plain_relu),
    _activation("GELU, once_differentiable", _WRONG, OnceGelu.apply, _plain_gelu),
    _activation("GELU that keeps its slope", _WRONG, SlopeKeepingGelu.apply, _plain_gelu),
    _weight_norm("weight_norm, tanh", True, nn.Tanh),
    _weight_norm("weight_norm, ReLU", True, nn.ReLU),
    _weight_norm("old weight_norm, tanh", False, nn.Tanh),
    _weight_norm("old weight_norm, ReLU", False, nn.ReLU),
    Family("straight-through sign", _NONE, _binary, plain=False),
    Family("straight-through rounded weights", _NONE, _rounded, plain=False),
    Family("bootstrapped value", _NONE, _bootstrapped, plain=False),
]
