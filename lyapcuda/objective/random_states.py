"""The global random states of Python, NumPy and torch, kept and put back bitwise."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStates"]

# The state of NumPy's Mersenne Twister in memory: its words, and the position among them.
_TWISTER_BYTES = 624 * 4 + 4


def _twister() -> bytes | None:
    """The bits of NumPy's global generator; None where it is of another kind than the usual."""
    generator = np.random.get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _TWISTER_BYTES)


class _NumPyState:
    """NumPy's global state as it is now.

    To read and write it takes longer than all other random states together, so that is done only
    where it has changed, which its bits in memory tell.
    """

    # The last state that was read, and its bits. The second of a pair of normal numbers is kept
    # outside of these: a state that has one is read and written each time.
    _last: tuple[bytes | None, dict[str, Any] | None] = (None, None)

    def __init__(self) -> None:
        self._bits, self._state = _NumPyState._last
        bits = _twister()
        if bits is None or bits != self._bits:
            self._state = np.random.get_state(legacy=False)
            self._bits = None if self._state["has_gauss"] else bits
            _NumPyState._last = self._bits, self._state

    def restore(self) -> None:
        if self._bits is None:  # the bits of later states may be these again, with another number
            _NumPyState._last = None, None
        if self._bits is None or _twister() != self._bits:
            np.random.set_state(self._state)


class RandomStates:
    """The global random states, as they are now.

    Args:
        devices: whose states are kept besides the CPU's.
        generators: of the user's own, kept as well.
    """

    def __init__(
        self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()
    ) -> None:
        self._python, self._numpy = random.getstate(), _NumPyState()
        self._torch = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        random.setstate(self._python)
        self._numpy.restore()
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self._generators:
            generator.set_state(state)
