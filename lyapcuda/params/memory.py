"""How much memory is free."""

from __future__ import annotations

import math
import os

import torch

__all__ = ["free_bytes"]


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that isn't known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if device.type != "cpu" or any(name not in os.sysconf_names for name in names):
        return None
    return math.prod(map(os.sysconf, names))
