"""LyapunovSGD on 2 ranks: the steps of one process, on replicas and on shards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, held, loss_of, wrap

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
        if options.get("momentum", 0.9):
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


def accumulated_gradients_are_an_error_on_all_ranks(rank: int, how: str) -> None:
    model, x, y = build("mlp", torch.float64, BATCH * dist.get_world_size())
    model, mine = wrap(model, how), slice(rank * BATCH, (rank + 1) * BATCH)
    optimizer = lyapcuda.LyapunovSGD(model.parameters(), gain=0.1, warmup_iterations=2)
    closure = lambda: loss_of(model, x[mine], y[mine])  # noqa: E731
    for _ in range(2):
        optimizer.step(closure)
    closure().backward()
    before = [held(p.grad).clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="gradients are in .grad already"):
        optimizer.step(closure)
    assert all(
        torch.equal(held(p.grad), g) for p, g in zip(model.parameters(), before, strict=True)
    )

    def clears():
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        return loss

    optimizer.step(clears)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(closure)
    assert equal_everywhere(optimizer.lr.reshape(1)) and float(optimizer.lr) > 0


@pytest.mark.parametrize("how", ["ddp", "ddp_view", "fsdp"])
def test_accumulated_gradients_are_an_error_on_all_ranks(how):
    on_ranks(2, accumulated_gradients_are_an_error_on_all_ranks, how)
