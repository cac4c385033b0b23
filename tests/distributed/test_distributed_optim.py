"""LyapunovSGD on 2 ranks: the steps of one process, on replicas and on shards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, loss_of, wrap

STEPS = 4


def trained(model, x, y, options):
    optimizer = lyapcuda.LyapunovSGD(
        model.parameters(), gain=0.3, warmup_iterations=8, warmup_tol=0.5, **options
    )
    rates = []
    for _ in range(STEPS):
        optimizer.step(lambda: loss_of(model, x, y))
        rates.append(optimizer.rates.clone())
    return optimizer, torch.stack([rate.reshape(-1) for rate in rates])


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps_are_those_of_one_process(rank: int, how: str, options: dict) -> None:
    size = dist.get_world_size()
    model, x, y = build("mlp", torch.float64, BATCH * size)
    alone = copy.deepcopy(model)
    plain, expected = trained(alone, x, y, options)
    wrapped = wrap(model, how)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    optimizer, found = trained(wrapped, x[mine], y[mine], options)
    assert equal_everywhere(found)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    for a, b in zip(wrapped.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=1e-7, atol=1e-9)
        if options.get("momentum"):
            held = optimizer.state[a]["momentum_buffer"]
            expected_buffer = plain.state[b]["momentum_buffer"]
            torch.testing.assert_close(whole(held), expected_buffer, rtol=1e-7, atol=1e-9)
    # It saves and goes on.
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step(lambda: loss_of(wrapped, x[mine], y[mine]))
    plain.step(lambda: loss_of(alone, x, y))
    for a, b in zip(wrapped.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"k": 3, "momentum": 0.9}], ids=["k=1", "k=3, momentum"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_steps_are_those_of_one_process(how, options):
    on_ranks(2, steps_are_those_of_one_process, how, options)
