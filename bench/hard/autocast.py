"""Nets of float32 parameters under autocast; the truth is without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hard.problem import Asks, Family, Loss, Problem, clusters, mlp, supervised

_ASKS: Asks = (("LA", 1), ("LA", 3), ("SA", 1))


class Attention(nn.Module):
    """Self-attention over 5 tokens of 8 numbers, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return self.out(x + mixed.transpose(1, 2).flatten(2)).mean(1)


def _tokens() -> tuple[Tensor, Tensor]:
    x, y = clusters(64, features=40)
    return x.unflatten(1, (5, 8)), y


def _under(dtype: torch.dtype) -> Callable[[nn.Module, Loss], Loss]:
    def closure(model: nn.Module, loss: Loss) -> Loss:
        def cast() -> Tensor:
            with torch.autocast("cpu", dtype):
                return loss()

        return cast

    return closure


_NETS: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "MLP GELU": (lambda: mlp(nn.GELU), clusters),
    "MLP ReLU": (lambda: mlp(nn.ReLU), clusters),
    "attention": (Attention, _tokens),
}


def _family(name: str, short: str, dtype: torch.dtype) -> Family:
    build, data = _NETS[name]

    def make(seed: int, parameters: torch.dtype) -> Problem:
        return supervised(seed, parameters, build, data=data, closure=_under(dtype))

    return Family(
        f"{name}, {short}", "autocast", make, dtypes=(torch.float32,), asks=_ASKS, plain=False
    )


FAMILIES = [
    _family(name, short, dtype)
    for short, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    for name in _NETS
]
