"""A model whose every evaluation leaves traces, and what there is to compare afterwards."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn


class Noisy(nn.Module):
    """Dropout, BatchNorm and Python, NumPy and torch randomness in one forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12, affine=False)
        self.dropout, self.last = nn.Dropout(0.1), nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls = self.calls + 1  # replaced, not written in place
        x = x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand()
        return self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))


def interrupted(closure, at):
    """A closure whose ``at``-th call raises a KeyboardInterrupt once it has evaluated."""
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        loss = closure()
        if calls == at:
            raise KeyboardInterrupt
        return loss

    return failing


def snapshot(model):
    """Bytes of everything that must not change."""
    tensors = [*model.parameters(), *model.buffers()]
    grads = [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()]
    return (
        [t.detach().numpy().tobytes() for t in tensors],
        [t.data_ptr() for t in model.parameters()],
        grads,
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        [np.asarray(part).tobytes() for part in np.random.get_state()[1:]],
        model.training,
    )
