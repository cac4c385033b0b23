"""DDP and FSDP2 on 2 and 3 ranks: the values of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, held, loss_of, same, wrap

STEPS = 6


def measured(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    make: Callable[[], object],
    train: bool,
    steps: int = STEPS,
) -> Tensor:
    """(steps, 4, k): h, residual, exponent and the number of gradients at every step of a small
    training run.
    """
    tracker = make()
    optimizer = tracker.optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    if not tracker.due:  # there is no P yet
        loss_of(model, x, y).backward()
        optimizer.step()
    rows = []
    for _ in range(steps):
        tracker.step(lambda: loss_of(model, x, y), leave_grad=train)  # noqa: B023
        if train:
            optimizer.step()
        found = [x.reshape(-1) for x in (tracker.h, tracker.residual, tracker.exponent)]
        rows.append(torch.stack([*found, torch.full_like(found[0], tracker.gradients)]))
    assert int(tracker.steps.max()) == steps and int(tracker.skipped.max()) == 0
    return torch.stack(rows)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The same run without a tracker."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def compare(rank: int, how: str, net: str, dtype: torch.dtype, options: dict, train: bool) -> float:
    size = dist.get_world_size()
    model, x, y = build(net, dtype, BATCH * size)
    alone = copy.deepcopy(model)

    def make(m: nn.Module) -> Callable[[], lyapcuda.CurvatureTracker]:
        # ε is as large as gradients: what little of them rounding leaves doesn't decide P.
        adam = {"optimizer": torch.optim.Adam(m.parameters(), lr=1e-3, eps=1e-2)}
        how = {**options, **adam} if options.get("optimizer") else options
        return lambda: lyapcuda.CurvatureTracker(m.parameters(), **how)

    truth = measured(alone, x, y, make(alone), train)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    wrapped, plain = (wrap(copy.deepcopy(model), how) for _ in range(2))
    found = measured(wrapped, x[mine], y[mine], make(wrapped), train)
    assert equal_everywhere(found)
    assert torch.equal(found[:, 3], truth[:, 3])
    if "tol" in options:
        assert options["k"] < found[0, 3, 0] < found[-1, 3, 0]
    if "tol" in options and train:
        trained(plain, x[mine], y[mine])
        parts = [[held(p).detach() for p in m.parameters()] for m in (wrapped, plain)]
        # (Three ranks' sums depend on DDP's buckets, which its first backward() makes anew.)
        assert size == 3 or same(*parts)
    scale = truth[:, 0].abs().max()
    apart = (found[:, 0] - truth[:, 0]).abs().max() / scale
    limit = 2e-3
    if dtype == torch.float64:  # sums in another order, over Δq: that of one side of θ is smaller
        limit = 1e-9 if "estimate" in options else 3e-8
    assert apart < limit, f"{how} {net} {dtype} {options}: {float(apart):.2g}"
    return float(apart)


def many(rank: int, cases: list[tuple]) -> list[float]:
    return [compare(rank, *case) for case in cases]


F32, F64 = torch.float32, torch.float64
MEAN = {"estimate": "rayleigh"}  # of both sides of θ
CASES = [
    ("ddp", "mlp", F64, {}, True),
    ("ddp", "attention", F32, {"k": 3}, True),
    ("ddp_view", "mlp", F32, {"k": 2, "which": "BE"}, False),
    ("ddp_static", "mlp", F64, {"which": "SA", "momentum": 0.5, **MEAN}, True),
    ("fsdp", "mlp", F64, {}, True),
    ("fsdp", "mlp", F32, {}, True),
    ("fsdp", "attention", F64, {"k": 3, **MEAN}, True),
    ("fsdp", "attention", F32, {"k": 3, "which": "BE"}, False),
    ("fsdp_root", "mlp", F64, {"k": 3, "momentum": 0.5, "weight_decay": 1e-2, **MEAN}, True),
    ("fsdp_root", "mlp", F64, {"estimate": "paper", "k": 1}, True),
    ("ddp_view", "mlp", F64, {"k": 1, "tol": 0.02, "iterations": 3}, True),
    ("fsdp", "attention", F64, {"k": 2, "which": "BE", "tol": 0.1, "iterations": 4}, True),
    ("fsdp_root", "mlp", F64, {"k": 2, "momentum": 0.5, "tol": 0.1, "iterations": 2}, True),
    ("ddp", "mlp", F64, {"optimizer": "adam"}, True),
    ("fsdp", "mlp", F64, {"optimizer": "adam", "k": 3, **MEAN}, True),
    ("fsdp", "attention", F64, {"optimizer": "adam", "k": 2, "tol": 0.1}, False),
]


@pytest.mark.parametrize("size", [2, 3])
def test_the_values_of_one_process(size):
    on_ranks(size, many, CASES)


def bf16(rank: int) -> None:
    """bf16 parameters round θ + q and the gradients: near the float32 values of the same θ, in the
    mean of both sides of θ (each is some percent off, at the Δq that bf16 needs).
    """
    batch, steps = 64, 30
    model, x, y = build("mlp", torch.bfloat16, batch * dist.get_world_size())
    wide = copy.deepcopy(model).float()
    mine = slice(rank * batch, (rank + 1) * batch)

    def late(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        make = lambda: lyapcuda.CurvatureTracker(net.parameters(), 3, **MEAN)  # noqa: E731
        found = measured(net, x, y, make, False, steps)
        assert equal_everywhere(found)
        return found[-10:, 0].mean(0)

    truth = late(wide, x.float(), y.float())
    for how in ("ddp", "fsdp"):
        found = late(wrap(copy.deepcopy(model), how), x[mine], y[mine])
        torch.testing.assert_close(found, truth, rtol=2e-2, atol=0)


def test_16_bit_parameters_give_the_values_of_float32():
    on_ranks(2, bf16)
