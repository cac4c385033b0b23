"""Small nets as several ranks have them: replicated or sharded, each rank with its samples."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lyapcuda

#: Samples a rank.
BATCH = 6


class Attention(nn.Module):
    """A block with ``scaled_dot_product_attention`` and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x + mixed.squeeze(1)).flatten(0, 1)


def build(name: str, dtype: torch.dtype, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if name == "attention":
        tokens = torch.randint(0, 11, (samples, 5))
        return Attention().to(dtype), tokens, tokens.roll(-1, 1)
    # 7 and 3 rows: uneven on 2 and on 3 ranks; a single row: an empty shard.
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1)]
    model = nn.Sequential(*layers).to(dtype)
    return model, torch.randn(samples, 5, dtype=dtype), torch.randn(samples, 1, dtype=dtype)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    if out.shape == y.shape:
        return nn.functional.mse_loss(out, y)
    return nn.functional.cross_entropy(out, y.flatten())


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "plain":
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "ddp_view":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if how == "ddp_static":
        return DistributedDataParallel(model, static_graph=True)
    for child in model.children():
        if how != "fsdp_root" and isinstance(child, nn.Linear) and child.bias is not None:
            fully_shard(child)
    fully_shard(model, reshard_after_forward=None if how == "fsdp" else False)
    return model


def setting(rank: int, how: str, **options):
    model, x, y = build("mlp", torch.float32, BATCH * dist.get_world_size())
    model = wrap(model, how)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    return model, x[mine], y[mine], lyapcuda.CurvatureTracker(model.parameters(), **options)


def held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def snapshot(model: nn.Module, tracker) -> list[torch.Tensor]:
    """Bits of everything that a failed step must leave as it was."""
    with torch.no_grad():
        found = [held(p).clone() for p in model.parameters()]
        found += [held(p.grad).clone() for p in model.parameters() if p.grad is not None]
        found += [b.clone() for b in model.buffers()]
        for saved in tracker.state_dict()["separations"]:
            found += [saved["state"], *(held(q) for q in saved["q"])]
    return [torch.get_rng_state(), *found]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    bits = [[t.numpy().tobytes() for t in tensors] for tensors in (before, after)]
    return bits[0] == bits[1]
