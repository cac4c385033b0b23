"""A tracked training step against a plain one: pytest bench/step.py --benchmark-only"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lyapcuda

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.models import build  # noqa: E402


@pytest.mark.parametrize("form", ["plain", "tracked", "tracked, every=10", "LyapunovSGD"])
@pytest.mark.parametrize("name", ["mlp", "resnet0"])
def test_step(benchmark, name, form):
    torch.manual_seed(0)
    model = build(name, 3, 32, 10)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    every = 10 if "every" in form else 1
    tracker = lyapcuda.CurvatureTracker(model.parameters(), every=every)
    quasi_newton = lyapcuda.LyapunovSGD(model.parameters(), max_lr=1e-3)

    def closure():
        return nn.functional.cross_entropy(model(x), y)

    def plain():
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()

    def tracked():
        tracker.step(closure, leave_grad=True)
        optimizer.step()

    steps = {"plain": plain, "LyapunovSGD": lambda: quasi_newton.step(closure)}
    step = steps.get(form, tracked)

    def ten_steps():
        for _ in range(10):
            step()

    ten_steps()
    benchmark.group = name
    benchmark(ten_steps)
