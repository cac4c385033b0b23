"""CurvatureTracker: the memory that a step takes at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import resident_memory

#: Where the process finds it.
SUPPORT = Path(resident_memory.__file__).parent

MEMORY = """
import torch, lyapcuda
from resident_memory import be_frugal, peak_memory
be_frugal()
torch.set_num_threads(1)
MODES = ("plain", "leave", "keep", "measure", "batches")

def run(mode, n):
    theta = torch.nn.Parameter(torch.full((n,), 0.5))
    closure = lambda: (theta * theta).mean()
    def plain():
        theta.grad = None
        closure().backward()
    for _ in range(2):
        plain()
    tracker = None if mode == "plain" else lyapcuda.CurvatureTracker([theta])
    for _ in range(0 if tracker is None else 3):
        if mode == "keep":      # the user's own gradient stays beside ours
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

for mode in MODES:      # so that no code is loaded later
    run(mode, 100)
N = 6_000_000           # the count of pages is only good to a megabyte or so
for mode in MODES:
    with peak_memory() as peak:
        run(mode, N)
    print(peak.bytes / (4 * N))
"""


def test_no_more_than_three_extra_buffers():
    """Peak memory of a process of its own, in units of N floats."""
    command = [sys.executable, "-c", MEMORY]
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    plain, leave, keep, measure, batches = map(float, found.stdout.split())
    assert 3.9 < plain < 4.1  # θ, its gradient, and what autograd needs: the measure is right
    assert leave - plain < 3.1
    assert keep - plain < 3.1
    assert measure - plain < 3.4
    assert batches - plain < 3.4
