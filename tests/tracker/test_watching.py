"""Measuring curvature changes nothing: drawn training runs leave the same bits with it as without
it, or an error comes before anything has changed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lyapcuda
import watched_training
from watched_nets import SCENES
from watched_training import FAULTS, WAYS, differences, draw, kinds, refused, train

DRAWS = 2 * len(SCENES)


@pytest.mark.parametrize("seed", range(DRAWS))
def test_a_drawn_run_is_bitwise_that_without_a_tracker(seed):
    drawn = draw(seed)
    assert differences(train(drawn, False), train(drawn, True)) == [], drawn


def test_every_kind_is_drawn():
    drawn = {kind for seed in range(DRAWS) for kind in kinds(draw(seed))}
    expected = [f"scene: {s}" for s in SCENES] + [f"way: {way}" for way in WAYS]
    for name, values in {
        "optimizer": watched_training.OPTIMIZERS,
        "closure": watched_training.CLOSURES,
        "scheduler": watched_training.SCHEDULERS,
        "metric": watched_training.METRICS,
        "zero": ("none", "zeros", "never"),
        "micro": (1, 2, 3),
        "clip": ("norm", "value"),
        "amp": ("autocast", "around", "scaler"),
        "hook": ("tensor", "module", "post"),
    }.items():
        expected += [f"loop, {name}: {value}" for value in values]
    expected += ["tracker, mode: exact", "argument: measure", "argument: batches"]
    expected += ["loop, whole: True", "loop, ema: True", "loop, by_closure: True"]
    assert not set(expected) - drawn


@pytest.mark.parametrize("way", WAYS[1:4])
def test_a_trace_would_be_seen(way, monkeypatch):
    """A tracker that evaluates once too often, and puts nothing back, is noticed in each way."""
    take = lyapcuda.CurvatureTracker._take_step

    def once_more(self, closure, *args, **kwargs):
        closure()
        return take(self, closure, *args, **kwargs)

    monkeypatch.setattr(lyapcuda.CurvatureTracker, "_take_step", once_more)
    loop = watched_training.Loop(way == "attach", "backward" if way == "attach" else "loss")
    drawn = watched_training.Draw(0, "dropout", loop, way)
    assert "random.torch" in differences(train(drawn, False), train(drawn, True))


@pytest.mark.parametrize("way", WAYS[:4])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_measured_is_refused_and_changes_nothing(fault, way):
    assert refused(fault, way) == []


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("kept", ["list", "dict", "meter"])
def test_what_a_closure_keeps_in_objects_of_its_own_is_named_once(kept, way):
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    losses, last, meter = [], {"total": 0.0}, Meter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        loss = model(x).square().mean()
        value = loss.item()
        if kept == "list":
            losses.append(value)
        elif kept == "dict":
            last["total"] += value
        else:
            meter.total += value
        return loss

    tracker = lyapcuda.CurvatureTracker(model.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            if way == "backward":
                tracker.backward(closure)
            else:
                tracker.step(closure, leave_grad=way != "step")
            optimizer.step()
    name = {"list": "losses", "dict": "last", "meter": "meter"}[kept]
    assert [name in str(w.message) for w in said if w.category is UserWarning] == [True]
