"""CDAT and critical_sharpness on 2 ranks: the values of one process, on replicas and on shards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, loss_of, wrap


def trained(model, x, y):
    inner = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.01)
    optimizer = lyapcuda.CDAT(inner, every=2)
    rates = []
    for _ in range(4):
        optimizer.step(lambda: loss_of(model, x, y))
        rates.append(optimizer.rate)
    found = lyapcuda.critical_sharpness(lambda: loss_of(model, x, y), optimizer)
    return optimizer, torch.stack([*rates, optimizer.curvature]), found


def steps_are_those_of_one_process(rank: int, how: str) -> None:
    size = dist.get_world_size()
    model, x, y = build("mlp", torch.float64, BATCH * size)
    alone = copy.deepcopy(model)
    plain, expected, once = trained(alone, x, y)
    wrapped, mine = wrap(model, how), slice(rank * BATCH, (rank + 1) * BATCH)
    optimizer, found, again = trained(wrapped, x[mine], y[mine])
    assert equal_everywhere(found)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert again.converged and again.evaluations == once.evaluations
    assert abs(again.rate / once.rate - 1) < 1e-6
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: loss_of(wrapped, x[mine], y[mine]))
    plain.step(lambda: loss_of(alone, x, y))
    for a, b in zip(wrapped.parameters(), alone.parameters(), strict=True):
        a = a.detach()
        a = a.full_tensor() if hasattr(a, "full_tensor") else a
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_steps_are_those_of_one_process(how):
    on_ranks(2, steps_are_those_of_one_process, how)
