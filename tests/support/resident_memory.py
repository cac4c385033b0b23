"""The memory that a piece of code needs, from the resident memory of its process.

    be_frugal()
    with peak_memory() as peak:
        work()
    print(peak.bytes)

On Linux, as /proc/self has it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: everything of at least so many bytes goes back to
# the system as soon as it is freed.
_FRUGAL = {-3: 1 << 16, -1: 1 << 16}
# prctl's PR_SET_THP_DISABLE: a huge page counts 2 MB for whoever touches a byte of it.
_SMALL_PAGES = 41


@dataclass
class Peak:
    """Filled in at the end of `peak_memory`."""

    bytes: int = 0


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory in use: all (VmRSS), data (RssAnon), files (RssFile), peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def be_frugal() -> None:
    """From here on this process holds no memory but what it uses."""
    library = ctypes.CDLL(None)
    for option, value in _FRUGAL.items():
        library.mallopt(option, value)
    library.prctl(_SMALL_PAGES, 1, 0, 0, 0)


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most that is held inside beyond what was held before: data, not the code of libraries."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak, before, files = Peak(), resident(), resident("RssFile")
    yield peak
    # Pages of code are read when they are first run, and as many at once as the file system likes.
    code = max(0, resident("RssFile") - files)
    peak.bytes = resident("VmHWM") - before - code
