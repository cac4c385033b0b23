"""The memory that a piece of code takes from torch's allocator on the CPU, to the byte.

    peak = peak_allocated(work)

Exact and the same on every machine, where the resident memory of a process is right to a few
megabytes. Blind to what isn't torch's: `resident_memory` counts that too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_allocated(work: Callable[[], object]) -> int:
    """The most bytes that `work()` holds at once, of those it allocates itself."""
    gc.collect()  # what earlier work left isn't freed meanwhile, which would count as less
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
