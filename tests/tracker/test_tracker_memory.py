"""CurvatureTracker: the memory that a step takes at its peak."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lyapcuda
from allocated_memory import peak_allocated

N = 1_000_000


def run(mode: str) -> None:
    theta = torch.nn.Parameter(torch.full((N,), 0.5))

    def closure() -> torch.Tensor:
        return (theta * theta).mean()

    def plain() -> None:
        theta.grad = None
        closure().backward()

    for _ in range(2):
        plain()
    if mode == "plain":
        return
    tracker = lyapcuda.CurvatureTracker([theta], debug=False)
    for _ in range(3):
        if mode == "keep":  # the user's own gradient stays beside ours
            plain()
            tracker.step(closure)
            continue
        theta.grad = None
        if mode == "measure":
            tracker.step(closure, measure=closure, leave_grad=True)
        elif mode == "batches":
            parts = torch.ones(4).split(2)
            tracker.step(lambda b: closure() * b.mean(), batches=parts, leave_grad=True)
        else:
            tracker.step(closure, leave_grad=True)


def test_no_more_than_three_extra_buffers():
    """In units of N floats; `plain` is θ, its gradient, and what autograd needs."""
    modes = ("plain", "leave", "keep", "measure", "batches")
    peaks = {mode: peak_allocated(partial(run, mode)) / (4 * N) for mode in modes}
    assert peaks["plain"] == pytest.approx(4, abs=0.001)  # the measure is right
    assert peaks["leave"] - peaks["plain"] < 3.1
    assert peaks["keep"] - peaks["plain"] < 3.1
    assert peaks["measure"] - peaks["plain"] < 3.4
    assert peaks["batches"] - peaks["plain"] < 3.4
