"""What an evaluation may change besides its result, kept and put back bitwise.

Random states, the buffers of modules (also ones that it registers or replaces), and the gradients
of parameters that aren't tracked.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lyapcuda.interrupts import deferred
from lyapcuda.shards import is_sharded, reshard

__all__ = ["Loose", "RandomStates", "Surroundings", "capturing", "modules_of", "untracked"]


def modules_of(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Every living module that holds one of the parameters, directly or in a child, with children.

    Their buffers are what a forward pass may change. A parameter doesn't know its module, so this
    asks the garbage collector: once for a tracker, some tens of milliseconds.
    """
    tracked = {id(p) for p in parameters}
    found: dict[int, nn.Module] = {}
    # type(), not isinstance(): some objects answer the latter by importing half a library.
    candidates = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    candidates = [m for m in candidates if "_modules" in m.__dict__]
    if any(is_sharded(p) for p in parameters):
        reshard(candidates)  # after a forward pass alone, FSDP2 has other parameters in place
    for candidate in candidates:
        if any(id(p) in tracked for p in candidate.parameters()):
            found.update((id(m), m) for m in candidate.modules())
    return list(found.values())


def _value_of(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


class RandomStates:
    """The global random states of Python, NumPy and torch, as they are now.

    Args:
        devices: whose states are kept besides the CPU's.
        generators: of the user's own, kept as well.
    """

    def __init__(
        self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()
    ) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        for generator, state in self._generators:
            generator.set_state(state)


class Loose(nn.Module):
    """Parameters that may be in no module, as if they were in one: their gradients are put back."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._loose = list(parameters)  # (tensors of any class: not registered)

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        return iter(self._loose)


def _own_parameters(module: nn.Module) -> Iterable[Tensor | None]:
    # The dictionary where nothing stands before it: parameters() walks it in Python.
    if type(module).parameters is nn.Module.parameters:
        return module._parameters.values()
    return module.parameters(recurse=False)


def untracked(parameters: Sequence[Tensor], modules: Sequence[nn.Module]) -> list[Tensor]:
    """The modules' other parameters that a backward() may give a gradient."""
    others = {id(p): p for m in modules for p in _own_parameters(m) if p is not None}
    for parameter in parameters:
        others.pop(id(parameter), None)
    return [p for p in others.values() if p.requires_grad]


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Surroundings:
    """What an evaluation may change besides its result: random states, buffers, other gradients."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        modules: Sequence[nn.Module],
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        if capturing():
            raise RuntimeError(
                "a measurement can't be captured in a CUDA graph: it reads and restores random "
                "states on the host. Measure outside of it; the ops of lyapcuda.ops can be captured"
            )
        # DDP may have gradients lie in its buckets, which the next evaluation writes.
        buckets = any(
            isinstance(m, DistributedDataParallel) and m.gradient_as_bucket_view for m in modules
        )
        self._gradients = [(p, p.grad, _value_of(p.grad) if buckets else None) for p in parameters]
        # Accumulation is in place, so the values of other parameters' gradients are kept as well.
        self._other_gradients = [
            (p, p.grad, None if p.grad is None else p.grad.detach().clone())
            for p in untracked(parameters, modules)
        ]
        # Whole dictionaries: a forward pass may replace a buffer, fill a None or register another.
        self._buffers = [
            (module, {name: (b, _value_of(b)) for name, b in module._buffers.items()})
            for module in modules
        ]
        self._random = RandomStates((p.device for p in parameters), generators)

    @deferred()
    def restore(self) -> None:
        """Everything but the tracked parameters' own gradients, bitwise."""
        self._random.restore()
        for module, buffers in self._buffers:
            if not buffers and not module._buffers:
                continue
            for buffer, value in buffers.values():
                if buffer is None:
                    continue
                # .data: a graph the user still holds may have saved this buffer, and finds it
                # unchanged.
                if buffer.shape == value.shape:
                    buffer.data.copy_(value)
                else:
                    buffer.data = value.clone()
            if not isinstance(module, torch.jit.ScriptModule):  # its buffers can't be replaced
                module._buffers.clear()
                module._buffers.update((name, buffer) for name, (buffer, _) in buffers.items())
        for parameter, gradient, value in self._other_gradients:
            if gradient is not None:
                gradient.data.copy_(value)
            parameter.grad = gradient

    @deferred()
    def restore_gradients(self) -> None:
        for parameter, gradient, value in self._gradients:
            if value is not None:
                gradient.data.copy_(value)
            parameter.grad = gradient
