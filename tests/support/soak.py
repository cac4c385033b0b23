"""Many steps of training with memory watched. For test_soak.py and bench/robustness.py."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from torch import nn

import lyapcuda
from resident_memory import resident


@dataclass(frozen=True)
class Soak:
    """Bytes of resident data and living tensors, a tenth of the way in and at the end."""

    steps: int
    memory: tuple[int, int]
    tensors: tuple[int, int]


def living() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def soak(steps: int) -> Soak:
    """SGD with a tracker of k = 1 and one of both ends attached, and LyapunovSGD, in turns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))
    x, y = torch.randn(32, 8), torch.randint(0, 3, (32,))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    quasi = lyapcuda.LyapunovSGD(model.parameters(), gain=0.1, warmup_iterations=0, max_lr=1e-2)
    lyapcuda.CurvatureTracker(model.parameters()).attach(sgd)
    ends = lyapcuda.CurvatureTracker(model.parameters(), k=2, which="BE", every=10)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    memory, tensors = [], []
    for step in range(steps):
        if step % 10 == 0:
            ends.step(closure)
        sgd.zero_grad()
        (quasi if step % 2 else sgd).step(closure)
        if step in (steps // 10, steps - 1):
            memory.append(resident("RssAnon"))
            tensors.append(living())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return Soak(steps, tuple(memory), tuple(tensors))
