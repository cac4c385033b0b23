"""Checkpoints through torch.distributed.checkpoint, resumed on another number of ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import lyapcuda
from ranks import equal_everywhere, on_ranks
from wrapped_nets import build, loss_of, wrap

#: Samples of the whole minibatch: divisible by every number of ranks.
SAMPLES = 12


def steps(model, tracker, count: int, rank: int = 0, size: int = 1) -> torch.Tensor:
    """(count, k): h at every step of plain gradient descent on this rank's part."""
    _, x, y = build("mlp", torch.float64, SAMPLES)
    part = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rows = []
    for _ in range(count):
        tracker.step(lambda: loss_of(model, x[part], y[part]), leave_grad=True)
        optimizer.step()
        rows.append(tracker.h.reshape(-1))
    return torch.stack(rows)


def started(owner) -> dict:
    """The state of a tracker or of an optimizer, with tensors to load into."""
    getattr(owner, "tracker", owner).start()
    return owner.state_dict()


def uninterrupted(options: dict) -> torch.Tensor:
    model, _, _ = build("mlp", torch.float64, SAMPLES)
    return steps(model, lyapcuda.CurvatureTracker(model.parameters(), **options), 9)


def stage(
    rank: int, how: str, options: dict, folder: str, done: int, kind: str = "tracker"
) -> None:
    """Loads what ``done`` steps left, takes three more, compares, saves."""
    size = dist.get_world_size()
    model, _, _ = build("mlp", torch.float64, SAMPLES)
    model = wrap(model, how)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), **options)
    if done:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # what is loaded has to come from the file
        state = {"model": get_model_state_dict(model), "tracker": started(tracker)}
        dcp.load(state, checkpoint_id=f"{folder}/{done}")
        set_model_state_dict(model, state["model"])
        tracker.load_state_dict(state["tracker"])
        assert tracker.history().step.tolist() == list(range(1, done + 1))
    found = steps(model, tracker, 3, rank, size)
    assert equal_everywhere(found)
    truth = uninterrupted(options)[done : done + 3]
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
    state = {"model": get_model_state_dict(model), "tracker": started(tracker)}
    dcp.save(state, checkpoint_id=f"{folder}/{done + 3}")


#: Its Δq is larger than that of the default, one of one side of θ, over which sums in another order
#: on other ranks would show as 1e-8.
MEAN = {"estimate": "rayleigh"}


@pytest.mark.parametrize(
    ("options", "route"),
    [
        (MEAN, [(2, "fsdp"), (3, "fsdp"), (2, "fsdp")]),
        ({**MEAN, "k": 3, "which": "BE", "momentum": 0.5}, [(3, "fsdp"), (2, "ddp"), (1, "plain")]),
    ],
)
def test_resume_on_another_number_of_ranks(tmp_path, options, route):
    for i, (size, how) in enumerate(route):
        on_ranks(size, stage, how, options, str(tmp_path), 3 * i)


def optimizer_steps(model, optimizer, x, y, count: int) -> list[torch.Tensor]:
    """The parameters after so many steps, whole."""
    for _ in range(count):
        optimizer.step(lambda: loss_of(model, x, y))
    found = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]


def optimizer_goes_on(rank: int, how: str, options: dict, folder: str) -> None:
    """LyapunovSGD through DCP, into a new model and optimizer."""
    single, x, y = build("mlp", torch.float64, SAMPLES)
    half = SAMPLES // dist.get_world_size()
    part = x[rank * half : (rank + 1) * half], y[rank * half : (rank + 1) * half]

    def new(model):
        return lyapcuda.LyapunovSGD(model.parameters(), gain=0.5, warmup_iterations=6, **options)

    model = wrap(copy.deepcopy(single), how)
    alone, shared = new(single), new(model)
    optimizer_steps(single, alone, x, y, 3)
    optimizer_steps(model, shared, *part, 3)
    state = {"model": get_model_state_dict(model), "optimizer": started(shared)}
    dcp.save(state, checkpoint_id=folder)
    model = wrap(copy.deepcopy(single), how)
    shared = new(model)
    if options.get("momentum", 0.9):  # a fresh optimizer has no buffers yet to load into
        optimizer_steps(model, shared, *part, 1)
    state = {"model": get_model_state_dict(model), "optimizer": started(shared)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    shared.load_state_dict(state["optimizer"])
    truth = optimizer_steps(single, alone, x, y, 2)
    found = optimizer_steps(model, shared, *part, 2)
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


def optimizers(rank: int, folder: str) -> None:
    optimizer_goes_on(rank, "ddp", {}, f"{folder}/ddp")
    optimizer_goes_on(rank, "fsdp", {"k": 3, "momentum": 0.5}, f"{folder}/fsdp")


def test_an_optimizer_goes_on(tmp_path):
    on_ranks(2, optimizers, str(tmp_path))
