"""Memory given back to the system before the tensor that holds it is gone."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

__all__ = ["release"]

_DONTNEED = 4  # MADV_DONTNEED: the pages are gone, and read as zeros from here on


def release(tensor: Tensor) -> None:
    """Gives back the whole pages of a contiguous tensor that was made by NumPy or torch on the CPU:
    what it held is lost. Does nothing but on Linux.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = tensor.data_ptr()
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (first + tensor.numel() * tensor.element_size() - start) // mmap.PAGESIZE
    if size > 0:
        length = ctypes.c_size_t(size * mmap.PAGESIZE)
        # Where the system refuses, the memory stays for a while longer.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, _DONTNEED)
