"""What is peculiar to FSDP2: shards that are written, gathered parameters, meshes, precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import lyapcuda
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.params.flat import FlatLayout
from ranks import equal_everywhere, on_ranks
from wrapped_nets import BATCH, build, held, loss_of, same, setting, snapshot, wrap


def leaves_no_trace(rank: int) -> None:
    model, x, y, tracker = setting(rank, "fsdp", k=3)
    loss_of(model, x, y).backward()
    memory = [held(p).data_ptr() for p in model.parameters()]
    before = snapshot(model, tracker)
    tracker.step(lambda: loss_of(model, x, y))
    after = snapshot(model, tracker)
    assert same(before, after[: len(before)])
    assert [held(p).data_ptr() for p in model.parameters()] == memory
    # The optimizer sees the gradient of θ.
    tracker.step(lambda: loss_of(model, x, y), leave_grad=True)
    assert same(before, snapshot(model, tracker)[: len(before)])


def gathered_before(rank: int) -> None:
    """A forward pass alone leaves the root's parameters gathered: they would not show θ + q."""
    values = []
    for evaluates in (False, True):
        model, x, y, tracker = setting(rank, "fsdp_root")
        for _ in range(3):
            if evaluates:
                with torch.no_grad():
                    model(x)
            tracker.step(lambda: loss_of(model, x, y))  # noqa: B023
        values.append(tracker.state.clone())
    assert same(*([value] for value in values))


def exception_in_the_forward_pass(rank: int) -> None:
    """On all ranks, at θ + q, inside of the model: what was gathered then must not stay."""
    model, x, y, tracker = setting(rank, "fsdp_root", k=2)
    for _ in range(2):
        tracker.step(lambda: loss_of(model, x, y))
    with torch.no_grad():
        truth = model(x)
    model.reshard()
    before = snapshot(model, tracker)

    def broken(*_):
        raise ValueError("out of coffee")

    def halfway():
        loss_of(model, x, y)  # a forward pass without a backward
        raise ValueError("out of coffee")

    def goes_on():
        with torch.no_grad():
            assert torch.equal(model(x), truth)
        model.reshard()
        assert same(before, snapshot(model, tracker))

    handle = model[2].register_forward_hook(broken)
    with pytest.raises(ValueError, match="coffee"):
        tracker.step(lambda: loss_of(model, x, y))
    handle.remove()
    goes_on()
    with pytest.raises(ValueError, match="coffee"):
        tracker.step(halfway)
    goes_on()
    tracker.step(lambda: loss_of(model, x, y))
    assert int(tracker.steps) == 3


def vectors(rank: int) -> None:
    """q as DTensors; the first one doesn't depend on the number of ranks."""
    size = dist.get_world_size()
    single, x, y = build("mlp", torch.float64, BATCH * size)
    model = wrap(copy.deepcopy(single), "fsdp")
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    alone, shared = (lyapcuda.CurvatureTracker(m.parameters(), k=2) for m in (single, model))
    for _ in range(3):
        alone.step(lambda: loss_of(single, x, y))
        shared.step(lambda: loss_of(model, x[mine], y[mine]))
    assert shared.perturbation == pytest.approx(alone.perturbation, rel=1e-12)
    for i in range(2):
        for a, b in zip(alone.vector(i), shared.vector(i), strict=True):
            torch.testing.assert_close(b.full_tensor(), a, rtol=1e-7, atol=1e-10)


def mixed_precision(rank: int) -> None:
    """bf16 weights in the forward pass: Δq has to outgrow their rounding."""
    size = dist.get_world_size()
    single, x, y = build("mlp", torch.float32, BATCH * size)
    model = copy.deepcopy(single)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for child in model:
        if isinstance(child, nn.Linear):
            fully_shard(child, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    alone, shared = (lyapcuda.CurvatureTracker(m.parameters()) for m in (single, model))
    for _ in range(40):
        alone.step(lambda: loss_of(single, x, y))
        shared.step(lambda: loss_of(model, x[mine], y[mine].to(torch.bfloat16)).float())
    assert equal_everywhere(shared.state)
    assert shared.sizing.noise > 0.0 and shared.perturbation > 2 * alone.perturbation
    assert float(shared.h) == pytest.approx(float(alone.h), rel=0.1)


def smooth(rank: int) -> None:
    """FSDP2's own functions in the graph hide nothing: Δq is that of one process, and of DDP."""
    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(20, 90), nn.GELU(), nn.Linear(90, 1))
    x, y = torch.randn(2 * BATCH, 20), torch.randn(2 * BATCH, 1)
    mine, trackers = slice(rank * BATCH, (rank + 1) * BATCH), []
    for how in ("plain", "ddp", "fsdp"):
        model, here = wrap(copy.deepcopy(single), how), slice(None) if how == "plain" else mine
        trackers.append(lyapcuda.CurvatureTracker(model.parameters()))
        for _ in range(3):
            trackers[-1].step(lambda: loss_of(model, x[here], y[here]))  # noqa: B023
    layout = FlatLayout(single.parameters())
    expected = default_perturbation(layout, smooth=True, one_sided=True)
    assert expected < 0.8 * default_perturbation(layout)
    for tracker in trackers:
        assert tracker.perturbation == pytest.approx(expected, rel=1e-6)


def refused(rank: int) -> None:
    model, x, y, tracker = setting(rank, "fsdp")
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="6 of 8 parameters are DTensors"):
        lyapcuda.CurvatureTracker([*model.parameters(), *plain.parameters()])
    with pytest.raises(ValueError, match="process_group=.*mesh of their own"):
        lyapcuda.CurvatureTracker(model.parameters(), process_group=dist.group.WORLD)
    with pytest.raises(NotImplementedError, match="DTensor parameters .* not supported yet"):
        lyapcuda.eigsh(lambda: loss_of(model, x, y), model.parameters())
    with pytest.raises(NotImplementedError, match="DTensor"):
        lyapcuda.HessianOperator(lambda: loss_of(model, x, y), model.parameters())
    old = FullyShardedDataParallel(plain, device_id=torch.device("cpu"))
    tracker = lyapcuda.CurvatureTracker(old.parameters())
    with pytest.raises(NotImplementedError, match="FSDP1"):
        tracker.step(lambda: old(torch.ones(1, 2)).sum())


def attached(rank: int) -> None:
    """Inside optimizer.step(closure), with ``model=`` and a part of the minibatch."""
    model, x, y, _ = setting(rank, "fsdp")
    twin, *_ = setting(rank, "fsdp")
    results = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if net is model:
            tracker = lyapcuda.CurvatureTracker(net.parameters(), model=net[0])
            tracker.attach(optimizer, measure=lambda: loss_of(model, x[:4], y[:4]))
        for _ in range(3):
            optimizer.step(lambda net=net: closure_of(net, x, y))
        results.append([held(p).clone() for p in net.parameters()])
    assert int(tracker.steps) == 3 and equal_everywhere(tracker.state)
    assert same(*[[p.detach() for p in result] for result in results])


def closure_of(net, x, y):
    net.zero_grad()
    loss = loss_of(net, x, y)
    loss.backward()
    return loss


def on_two(rank: int) -> None:
    leaves_no_trace(rank)
    gathered_before(rank)
    exception_in_the_forward_pass(rank)
    vectors(rank)
    mixed_precision(rank)
    smooth(rank)
    refused(rank)
    attached(rank)


def test_fsdp2_on_two_ranks():
    on_ranks(2, on_two)


def hybrid(rank: int) -> None:
    """HSDP: two replicas of two shards each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    single, x, y = build("mlp", torch.float64, BATCH * 4)
    model = copy.deepcopy(single)
    fully_shard(model, mesh=mesh)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    alone, shared = (lyapcuda.CurvatureTracker(m.parameters(), k=2) for m in (single, model))
    for _ in range(3):
        alone.step(lambda: loss_of(single, x, y))
        shared.step(lambda: loss_of(model, x[mine], y[mine]))
    assert equal_everywhere(shared.state)
    torch.testing.assert_close(shared.h, alone.h, rtol=1e-9, atol=0)


def test_hybrid_sharding_on_four_ranks():
    on_ranks(4, hybrid)
