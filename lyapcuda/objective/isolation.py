"""Snapshot and restore what an evaluation may change besides its result, bitwise.

Random states, the buffers of modules (also ones that it registers or replaces), the gradients of
tensors that aren't tracked, and the plain attributes that an evaluation was seen to change.
"""

from __future__ import annotations

import gc
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lyapcuda.arguments import described
from lyapcuda.objective.attributes import AttributeValues, Place, same_bits
from lyapcuda.objective.interrupts import deferred
from lyapcuda.objective.random_states import RandomStates
from lyapcuda.params.shards import any_sharded, reshard

__all__ = [
    "LooseBuffers",
    "LooseParameters",
    "ParameterValues",
    "Snapshot",
    "States",
    "TrackedGradients",
    "capturing",
    "chosen_modules",
    "modules_of",
    "untracked",
]


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
    if any_sharded(parameters):
        reshard(candidates)  # after a forward pass alone, FSDP2 has other parameters in place
    for candidate in candidates:
        if any(id(p) in tracked for p in candidate.parameters()):
            found.update((id(m), m) for m in candidate.modules())
    return list(found.values())


def chosen_modules(
    model: nn.Module | Tensor | Iterable[nn.Module | Tensor] | None,
) -> list[nn.Module]:
    """The modules and tensors that a user names as ``model=``, with children; none for None.

    Raises:
        TypeError: something that is neither.
    """
    one = isinstance(model, nn.Module | Tensor)
    if model is not None and not one and not isinstance(model, Iterable):
        raise TypeError(f"model={described(model)}: expected torch.nn.Module, or several")
    models = () if model is None else (model,) if one else tuple(model)
    for module in models:
        if not isinstance(module, nn.Module | Tensor):
            raise TypeError(
                f"model={type(module).__name__}: expected a torch.nn.Module, or a tensor that "
                "requires a gradient"
            )
    tensors = [t for t in models if isinstance(t, Tensor)]
    found = [m for module in models if isinstance(module, nn.Module) for m in module.modules()]
    return [*found, LooseParameters(tensors)] if tensors else found


_BUFFERS, _PARAMETERS = operator.attrgetter("_buffers"), operator.attrgetter("_parameters")
_VALUES = operator.methodcaller("values")
#: Classes of tensors that are nothing but their memory.
_PLAIN = (Tensor, nn.Parameter)


def _has(modules: Sequence[nn.Module], kind: type) -> bool:
    """Whether one of them may be of a kind; there are few types among many modules."""
    return any(issubclass(t, kind) for t in set(map(type, modules)))


#: Parameters that a closure may turn out to write to are copied up to so many bytes.
_LOOKED_AT = 2**24


def _value_of(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


class LooseParameters(nn.Module):
    """Parameters that may be in no module, as if they were in one: their gradients are put back."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._loose = list(parameters)  # (tensors of any class: not registered)

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        return iter(self._loose)


class LooseBuffers(nn.Module):
    """Tensors that stand in for a module's buffers (functional_call), as if they were buffers."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._buffers.update((str(i), tensor) for i, tensor in enumerate(tensors))


def untracked(parameters: Sequence[Tensor], modules: Sequence[nn.Module]) -> list[Tensor]:
    """The modules' other parameters that a backward() may give a gradient."""
    tracked = {*map(id, parameters), id(None)}
    found = list(chain.from_iterable(map(_VALUES, map(_PARAMETERS, modules))))
    # Where nothing stands before it the dictionary itself: parameters() walks it in Python.
    walked = {t for t in set(map(type, modules)) if t.parameters is not nn.Module.parameters}
    for module in filter(lambda m: type(m) in walked, modules if walked else ()):
        found.extend(module.parameters(recurse=False))
    others = {id(p): p for p in found if id(p) not in tracked}
    return [p for p in others.values() if p.requires_grad]


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _Buffers:
    """The buffers of modules, as they are now: which there are, where they lie, their values."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # Whole dictionaries: a forward pass may replace a buffer, fill a None or register another.
        self._names: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        # Most modules have none, and in the end they have none.
        self._without = [module for module in modules if not module._buffers]
        tensors: dict[int, Tensor] = {}
        if len(self._without) < len(modules):
            for module in filter(_BUFFERS, modules):
                names = dict(module._buffers.items())
                tensors.update((id(b), b) for b in names.values() if b is not None)
                self._names.append((module, names))
        if _has(modules, torch.jit.ScriptModule):  # whose buffers can't be replaced
            replaced = [n for n in self._names if not isinstance(n[0], torch.jit.ScriptModule)]
            self._names = replaced
        # Buffers, other tensors over their memory, and the values: by dtype and device, which
        # copies then share a launch.
        self._alike: dict[tuple, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        self._apart: list[tuple[Tensor, Tensor]] = []
        for buffer in tensors.values():
            if type(buffer) not in _PLAIN or buffer.layout is not torch.strided:
                self._apart.append((buffer, buffer.detach().clone()))
                continue
            buffers, places, values = self._alike.setdefault(
                (buffer.dtype, buffer.device), ([], [], [])
            )
            place = buffer.data
            buffers.append(buffer), places.append(place), values.append(place.clone())

    def restore(self) -> None:
        # .data: a graph the user still holds may have saved a buffer, and finds it unchanged.
        for buffers, places, values in self._alike.values():
            for buffer, place in zip(buffers, places, strict=True):
                buffer.data = place  # it may have been pointed elsewhere, or resized
            torch._foreach_copy_(places, values)
        for buffer, value in self._apart:
            if buffer.shape == value.shape:
                buffer.data.copy_(value)
            else:
                buffer.data = value.clone()
        for module, names in self._names:
            module._buffers.clear()
            module._buffers.update(names)
        if any(map(_BUFFERS, self._without)):
            for module in self._without:
                if not isinstance(module, torch.jit.ScriptModule):
                    module._buffers.clear()


class TrackedGradients:
    """The gradients of the tracked parameters, as they are now.

    Args:
        parameters: the tracked ones.
        modules: those that hold them.
        values: keep copies of them, as evaluations may write to their memory.
    """

    def __init__(
        self, parameters: Sequence[Tensor], modules: Sequence[nn.Module], values: bool = False
    ) -> None:
        # DDP may have gradients lie in its buckets, which the next evaluation writes.
        buckets = _has(modules, DistributedDataParallel) and any(
            isinstance(m, DistributedDataParallel) and m.gradient_as_bucket_view for m in modules
        )
        self._parameters, self._gradients = parameters, [p.grad for p in parameters]
        self._values = [_value_of(g) for g in self._gradients] if values or buckets else ()
        #: Whether a closure was seen to clear them before its backward pass. None: not; False: some
        #: of them.
        self.cleared: bool | None = None

    @property
    def values(self) -> list[Tensor | None]:
        """The copies, as far as some are kept."""
        return list(self._values)

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradients themselves."""
        return self._gradients

    @property
    def any(self) -> bool:
        """Whether a tracked parameter had a gradient."""
        return any(gradient is not None for gradient in self._gradients)

    @deferred()
    def restore(self) -> None:
        """Puts them back, bitwise."""
        for gradient, value in zip(self._gradients, self._values, strict=bool(self._values)):
            if value is not None:
                gradient.data.copy_(value)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    @deferred()
    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds what is in ``.grad`` now to them, as ``loss.backward()`` would have."""
        for i, (parameter, gradient) in enumerate(
            zip(self._parameters, self._gradients, strict=True)
        ):
            if gradient is None:
                continue
            if parameter.grad is None:
                if self._values:
                    gradient.data.copy_(self._values[i])
                parameter.grad = gradient
            elif self._values:  # both lie in the bucket
                parameter.grad.add_(self._values[i])
            else:
                gradient.add_(parameter.grad)
                parameter.grad = gradient


class States:
    """Random states, and the buffers of modules, as they are now.

    Args:
        parameters: on whose devices random states are kept.
        modules: whose buffers are kept.
        generators: of the user's own, whose states are kept too.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        modules: Sequence[nn.Module],
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self._buffers = _Buffers(modules)
        self._random = RandomStates((p.device for p in parameters if not p.is_cpu), generators)

    @deferred()
    def restore(self) -> None:
        """Puts them back, bitwise."""
        self._random.restore()
        self._buffers.restore()


class _OtherGradients:
    """Gradients of tensors that aren't tracked, as they are now.

    Accumulation is in place, so their values are kept as well.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        for tensor in tensors:
            self.notice(tensor)

    def notice(self, tensor: Tensor) -> bool:
        """Adds one, unless it is there already; returns whether it did."""
        new = id(tensor) not in self._held
        if new:
            self._held[id(tensor)] = tensor, tensor.grad, _value_of(tensor.grad)
        return new

    def gradient_of(self, tensor: Tensor) -> Tensor | None:
        """The gradient itself, of one that is there."""
        return self._held[id(tensor)][1]

    def restore(self) -> None:
        for tensor, gradient, value in self._held.values():
            if gradient is not None:
                gradient.data.copy_(value)
            tensor.grad = gradient


class ParameterValues:
    """Where parameters lie, and their values: for closures whose forward pass writes them.

    Args:
        parameters: which.
        most: keep values of so many bytes at most, else only where they lie.
    """

    def __init__(self, parameters: Sequence[Tensor], most: float = math.inf) -> None:
        kept = sum(p.numel() * p.element_size() for p in parameters) <= most
        self._held = [(p, p.data, p.data.clone() if kept else None) for p in parameters]

    def only(self, parameters: Sequence[Tensor]) -> ParameterValues:
        """Those of some of them."""
        chosen, some = {id(p) for p in parameters}, ParameterValues(())
        some._held = [held for held in self._held if id(held[0]) in chosen]
        return some

    def changed(self) -> list[Tensor]:
        """Which lie elsewhere now, or have other values."""
        return [
            p
            for p, place, value in self._held
            if p.data_ptr() != place.data_ptr()
            or value is not None
            and not same_bits(p.data, value)
        ]

    def restore(self) -> None:
        """Puts them back, bitwise."""
        for parameter, place, value in self._held:
            if value is not None:
                place.copy_(value)
            parameter.data = place


class Snapshot:
    """What an evaluation may change besides its result, as it is now.

    That is: random states, module buffers, the gradients of the tracked parameters, those of other
    tensors, and plain attributes.

    Args:
        parameters: the tracked ones.
        modules: whose buffers and other parameters' gradients are kept.
        generators: of the user's own, whose states are kept too.
        values: keep copies of the tracked gradients as well.
        leaves: other tensors whose gradients are kept.
        places: plain attributes that are kept.
        written: parameters whose values are kept as well.
        looked_at: parameters of which it isn't known whether they are written to: values are kept
            of few, of more where they lie.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        modules: Sequence[nn.Module],
        generators: Iterable[torch.Generator] = (),
        *,
        values: bool = False,
        leaves: Iterable[Tensor] = (),
        places: Iterable[Place] = (),
        written: Sequence[Tensor] = (),
        looked_at: Sequence[Tensor] = (),
    ) -> None:
        if capturing():
            raise RuntimeError(
                "a measurement can't be captured in a CUDA graph: it reads and restores random "
                "states on the host. Measure outside of it; the ops of lyapcuda.ops can be captured"
            )
        self._parameters = parameters
        self._tracked = TrackedGradients(parameters, modules, values)
        self._others = _OtherGradients(chain(untracked(parameters, modules), leaves))
        self._states = States(parameters, modules, generators)
        self._attributes = [AttributeValues(places)] if places else []
        self._values = [ParameterValues(written)] if written else []
        if looked_at:
            self._values.append(ParameterValues(looked_at, _LOOKED_AT))
        #: Buffers of modules that were noticed later.
        self._later: list[_Buffers] = []
        #: Leaves that were kept, or noticed later; whether the latter's gradients are then cleared.
        self.leaves: list[Tensor] = list(leaves)
        self.clears = False

    @property
    def gradients(self) -> list[Tensor | None]:
        """The tracked gradients' copies."""
        return self._tracked.values

    def notice(self, leaf: Tensor) -> None:
        """Keeps the gradient of another tensor too, as it is now; unless it is kept already."""
        if self._others.notice(leaf):
            self.leaves.append(leaf)
            if self.clears:
                leaf.grad = None

    def gradient_of(self, leaf: Tensor) -> Tensor | None:
        """The gradient that was kept of a leaf that was noticed."""
        return self._others.gradient_of(leaf)

    def notice_modules(self, modules: Sequence[nn.Module]) -> None:
        """Keeps the buffers of modules, and their parameters' gradients, too."""
        self._later.append(_Buffers(modules))
        for parameter in untracked(self._parameters, modules):
            self._others.notice(parameter)

    def notice_values(self, values: ParameterValues) -> None:
        """Keeps parameters' values too."""
        self._values.append(values)

    def notice_attributes(self, values: AttributeValues) -> None:
        """Keeps plain attributes too."""
        self._attributes.append(values)

    @deferred()
    def restore(self) -> None:
        """Everything but the tracked parameters' own gradients, bitwise."""
        self._states.restore()
        for buffers in self._later:
            buffers.restore()
        self._others.restore()
        for attributes in self._attributes:
            attributes.restore()
        for values in self._values:
            values.restore()

    def restore_gradients(self) -> None:
        """The tracked parameters' gradients, bitwise."""
        self._tracked.restore()
