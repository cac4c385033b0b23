"""How much memory is free."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device, caches that give way included; None where that isn't
    known.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if not hasattr(os, "sysconf_names") or any(name not in os.sysconf_names for name in names):
        return None
    return math.prod(map(os.sysconf, names))
