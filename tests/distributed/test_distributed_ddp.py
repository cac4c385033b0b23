"""What is peculiar to DDP, and to gradients averaged by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, loss_of, same, setting, snapshot, wrap


def buckets(rank: int) -> None:
    """A gradient in DDP's buckets survives evaluations that write there."""
    model, x, y, tracker = setting(rank, "ddp_view", k=2)
    for _ in range(2):  # the second pass has the buckets in their final order
        model.zero_grad()
        loss_of(model, x, y).backward()
    before = snapshot(model, tracker)
    tracker.step(lambda: 2 * loss_of(model, x, y))
    assert same(before, snapshot(model, tracker)[: len(before)])


def added(rank: int) -> None:
    """tracker.backward adds what loss.backward() adds, also where gradients lie in buckets."""
    for how in ("ddp", "ddp_view", "fsdp"):
        model, x, y, tracker = setting(rank, how)
        closure = lambda model=model, x=x, y=y: loss_of(model, x, y)  # noqa: E731
        closure().backward()
        once = [p.grad.clone() for p in model.parameters()]
        for number in (2, 3):
            tracker.backward(closure)
            for p, gradient in zip(model.parameters(), once, strict=True):
                torch.testing.assert_close(p.grad, number * gradient)


def buffers(rank: int) -> None:
    """Running statistics, which DDP broadcasts in every forward pass, are put back."""
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
    model = DistributedDataParallel(net)
    x = torch.randn(8, 5)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), model=net)
    twin = copy.deepcopy(net)
    tracker.step(lambda: model(x).square().mean())
    assert same([*twin.buffers()], [*net.buffers()])
    for _ in range(3):
        before = snapshot(net, tracker)
        tracker.step(lambda: model(x).square().mean())
        assert same(before[: 1 + 6 + 3], snapshot(net, tracker)[: 1 + 6 + 3])
    # q stays the same on all ranks, dropout masks and statistics of their own notwithstanding.
    assert all(map(equal_everywhere, tracker.vector()))
    assert equal_everywhere(tracker.state)


def by_hand(rank: int) -> None:
    """process_group=: gradients averaged in the closure, random numbers of every rank's own."""
    size = dist.get_world_size()
    single, x, y = build("mlp", torch.float64, BATCH * size)
    model = copy.deepcopy(single)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)

    def closure():
        loss = loss_of(model, x[mine], y[mine])
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= size
        return loss

    alone = lyapcuda.CurvatureTracker(single.parameters())
    shared = lyapcuda.CurvatureTracker(model.parameters(), process_group=dist.group.WORLD)
    for _ in range(3):
        alone.step(lambda: loss_of(single, x, y))
        shared.step(closure)
    torch.testing.assert_close(shared.h, alone.h, rtol=1e-9, atol=0)
    assert equal_everywhere(shared.state)


def copied(rank: int) -> None:
    """A tracker that has measured on several ranks can be pickled, and goes on as one of them."""
    model, x, y, tracker = setting(rank, "ddp")
    tracker.step(lambda: loss_of(model, x, y))
    saved = tracker.state_dict()
    again = lyapcuda.CurvatureTracker(model.parameters())
    again.load_state_dict(pickle.loads(pickle.dumps(saved)))
    twin = copy.deepcopy(tracker._layout.ranks)
    assert twin.sum(torch.ones(1)) == 1 and not twin.sharded
    for one in (tracker, again):
        one.step(lambda: loss_of(model, x, y))
    assert torch.equal(tracker.state, again.state)


def solver(rank: int) -> None:
    """eigsh needs no exchange of its own: DDP averages every gradient."""
    size = dist.get_world_size()
    single, x, y = build("mlp", torch.float64, BATCH * size)
    model = wrap(copy.deepcopy(single), "ddp")
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    options = dict(k=3, which="BE", tol=1e-4)
    alone = lyapcuda.eigsh(lambda: loss_of(single, x, y), single.parameters(), **options)
    shared = lyapcuda.eigsh(lambda: loss_of(model, x[mine], y[mine]), model.parameters(), **options)
    torch.testing.assert_close(shared.eigenvalues, alone.eigenvalues, rtol=1e-6, atol=1e-9)
    assert equal_everywhere(shared.eigenvectors)


def micro_batches(rank: int) -> None:
    """``batches=`` and ``measure=``: the same decisions and the same bits everywhere."""
    model, x, y, tracker = setting(rank, "ddp_view")
    parts = lyapcuda.split_batch((x, y), 0.5)
    for _ in range(2):
        tracker.step(lambda b: loss_of(model, *b), batches=parts, leave_grad=True)
    assert all(equal_everywhere(p.grad) for p in model.parameters())
    whole = lambda: loss_of(model, x, y)  # noqa: E731
    tracker.step(whole, measure=lambda: loss_of(model, *parts[1]), leave_grad=True)
    model_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole().backward()
    torch.testing.assert_close(model_grads, [p.grad for p in model.parameters()])
    assert int(tracker.steps) == 3 and equal_everywhere(tracker.state)


def joined(rank: int) -> None:
    model, x, y, tracker = setting(rank, "ddp")
    with model.join(), pytest.raises(RuntimeError, match="join"):
        tracker.step(lambda: loss_of(model, x, y))


def on_two(rank: int) -> None:
    buckets(rank)
    added(rank)
    buffers(rank)
    by_hand(rank)
    copied(rank)
    solver(rank)
    micro_batches(rank)
    joined(rank)


def test_ddp_on_two_ranks():
    on_ranks(2, on_two)


def test_process_group_without_torch_distributed():
    tracker = lyapcuda.CurvatureTracker(nn.Linear(2, 1).parameters(), process_group=object())
    with pytest.raises(ValueError, match="process_group=.*isn't initialised"):
        tracker.step(lambda: torch.ones(()))
