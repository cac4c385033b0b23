"""Small losses whose Hessian is known in float64: smooth nets, and quadratics of any spectrum."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

NAMES = ("linear", "tanh_mlp", "gelu_mlp", "conv")
#: With one whose fused attention only its twin can be differentiated twice.
SOLVED = (*NAMES, "attention")


class Attention(nn.Module):
    """Self-attention over 5 tokens of 8 numbers, fused, or ``written_out`` for double backward."""

    written_out = False

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(8, 24), nn.Linear(8, 3), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.written_out:
            y = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)


class WrittenOutAttention(Attention):
    written_out = True


class Square(torch.autograd.Function):
    """x², with a backward that autograd can't look into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


@dataclass
class Case:
    """A model, its closure, and the eigenvalues (ascending) of the loss's exact Hessian."""

    model: nn.Module
    closure: Callable[[], Tensor]
    eigenvalues: Tensor

    @property
    def h0(self) -> float:
        return float(self.eigenvalues[-1])

    @property
    def hN(self) -> float:  # noqa: N802  (the paper's name)
        return float(self.eigenvalues[0])


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model and its inputs, from torch's global generator."""
    if name == "linear":
        return nn.Linear(5, 4), torch.randn(48, 5)
    if name == "tiny":
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(48, 4)
    if name == "tanh_mlp":
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(64, 6)
    if name == "gelu_mlp":
        layers = [nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 4)]
        return nn.Sequential(*layers), torch.randn(64, 10)
    if name == "attention":
        return Attention(), torch.randn(24, 5, 8)
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 4)]
    return nn.Sequential(*layers), torch.randn(32, 1, 8, 8)


def exact_eigenvalues(model: nn.Module, loss: Callable[[Callable], Tensor]) -> Tensor:
    """Eigenvalues of the Hessian of ``loss(forward)`` at the model's parameters, in float64."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if isinstance(module, Attention):
            module.written_out = True
    state = {name: p.detach() for name, p in twin.named_parameters()}
    sizes = [p.numel() for p in state.values()]

    def flat_loss(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        values = {n: v.view(p.shape) for (n, p), v in zip(state.items(), parts, strict=True)}
        return loss(lambda x: functional_call(twin, values, (x.double(),)))

    matrix = hessian(flat_loss)(torch.cat([p.flatten() for p in state.values()]))
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def case(name: str, seed: int, dtype: torch.dtype = torch.float32, kind: str = "ce") -> Case:
    """One of `SOLVED` with cross-entropy ("ce") or squared error ("mse") on random data."""
    model, closure, _ = _case(name, seed, dtype, kind)
    # Rounded no further than the random numbers were drawn, both have the same Hessian.
    drawn = torch.float32 if dtype == torch.float64 else dtype
    return Case(model, closure, _eigenvalues(name, seed, drawn, kind).clone())


@functools.cache
def _eigenvalues(name: str, seed: int, dtype: torch.dtype, kind: str) -> Tensor:
    model, _, loss = _case(name, seed, dtype, kind)
    return exact_eigenvalues(model, loss)


def _case(
    name: str, seed: int, dtype: torch.dtype, kind: str
) -> tuple[nn.Module, Callable[[], Tensor], Callable[[Callable], Tensor]]:
    """The model, its closure, and the loss of any forward function."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = build(name)
        labels = torch.randint(0, 3 if name == "attention" else 4, (len(x),))
    model, x = model.to(dtype), x.to(dtype)

    def loss(forward: Callable) -> Tensor:
        out = forward(x)
        if kind == "ce":
            return nn.functional.cross_entropy(out, labels)
        return nn.functional.mse_loss(
            out, nn.functional.one_hot(labels, out.shape[1]).to(out.dtype)
        )

    return model, lambda: loss(model), loss


def quadratic(spectrum: np.ndarray, seed: int, dtype=torch.float64):
    """θ and the closure of ½·θᵀHθ, H with the given spectrum in a random basis; H as an array."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum))))
    matrix = (basis * spectrum) @ basis.T
    matrix = (matrix + matrix.T) / 2
    theta = nn.Parameter(torch.tensor(rng.standard_normal(len(spectrum)), dtype=dtype))
    tensor = torch.tensor(matrix, dtype=dtype)
    return theta, (lambda: 0.5 * theta @ tensor @ theta), matrix
