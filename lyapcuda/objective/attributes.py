"""Plain attributes of objects: which of them an evaluation changes, and how they are put back."""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "AllAttributes",
    "AttributeValues",
    "Place",
    "Value",
    "plain_names",
    "same_bits",
]

#: Tensors in plain attributes up to so many bytes are copied to be compared and put back.
_MOST_BYTES = 2**26
#: How deep containers are looked into, and of how many members.
_DEPTH, _MANY = 2, 100
# What every module has by itself, but for the mode, and the hooks that are called.
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ALL_MODULES = {*vars(nn.Module()), "_is_hf_initialized"} - {"training", *_CALLED}
_NUMBERS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def plain_names(holder: Any) -> set[str]:
    """The names of an object's own attributes, of a module those that aren't the module's tables
    of parameters, buffers and children.
    """
    names = set(vars(holder))
    return names - _OF_ALL_MODULES if isinstance(holder, nn.Module) else names


class Value:
    """What an attribute holds now, so that a change of it is seen and can be undone.

    Args:
        value: a tensor's numbers and the members of lists, tuples, dictionaries, sets and deques
            are kept beside the object; of anything else the object alone. So of parameters, which
            are no state of an attribute's (an RNN lists its own), and of members of long containers
            (a data set).
    """

    def __init__(self, value: Any, depth: int = _DEPTH) -> None:
        self.value = value
        self._kept: Tensor | None = None
        self._version = 0
        self._members: list[Value] | None = None
        self._alone: list[Any] | None = None
        if isinstance(value, Tensor) and _is_trained(value):
            pass
        elif isinstance(value, Tensor):
            self._version = value._version if not value.is_inference() else 0
            plain = value.layout is torch.strided and not value.is_meta and not _is_wrapped(value)
            if plain and _bytes(value) <= _MOST_BYTES:
                self._kept = value.detach().clone()
        elif depth and isinstance(value, list | tuple | dict | set | deque):
            self._keys = list(value) if isinstance(value, dict) else None
            members = value.values() if isinstance(value, dict) else value
            if len(members) > _MANY:
                self._alone = list(members)
            else:
                self._members = [Value(member, depth - 1) for member in members]

    def differs(self, now: Any) -> bool:
        """Whether something else is held now, or the same with other contents."""
        if now is not self.value:
            plain = isinstance(now, _NUMBERS) and type(now) is type(self.value)
            return not (plain and (now == self.value or now != now))
        return self.is_changed()

    def is_changed(self) -> bool:
        """Whether the object's contents have changed."""
        value = self.value
        if isinstance(value, Tensor) and _is_trained(value):
            return False
        if isinstance(value, Tensor):
            if not value.is_inference() and value._version != self._version:
                return True
            kept = self._kept
            return kept is not None and not same_bits(kept, value.detach())
        if self._members is None and self._alone is None:
            return False
        if isinstance(value, dict):
            if list(value) != self._keys:
                return True
            value = value.values()
        now = list(value)
        if self._alone is not None:
            return not _are(now, self._alone)
        if len(now) != len(self._members):
            return True
        return any(member.differs(n) for member, n in zip(self._members, now, strict=True))

    @property
    def is_lost(self) -> bool:
        """Whether its contents have changed and can't be put back."""
        if isinstance(self.value, Tensor):
            return self._kept is None and self.is_changed()
        return any(member.is_lost for member in self._members or ())

    @torch.no_grad()
    def put_back(self) -> Any:
        """Puts its contents back, and returns the object."""
        value = self.value
        if isinstance(value, Tensor):
            if self._kept is not None:
                if value.shape == self._kept.shape:
                    value.data.copy_(self._kept)
                else:
                    value.data = self._kept.clone()
        elif self._members is not None or self._alone is not None:
            members = self._alone
            if members is None:
                members = [member.put_back() for member in self._members]
            # (Where nothing has changed nothing is written: others may be walking through it.)
            if isinstance(value, dict):
                if list(value) != self._keys or not _are(list(value.values()), members):
                    value.clear()
                    value.update(zip(self._keys, members, strict=True))
            elif _are(list(value), members):
                pass
            elif isinstance(value, list):
                value[:] = members
            elif isinstance(value, set | deque):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(members)
        return value


class Place:
    """One attribute of one object, which it doesn't keep alive.

    Args:
        holder: the object; None once it is gone.
        name: of the attribute.
        called: for messages.
    """

    def __init__(self, holder: Any, name: str, called: str) -> None:
        self._holder, self.name, self.called = weakref.ref(holder), name, called

    @property
    def holder(self) -> Any:
        return self._holder()


class AttributeValues:
    """Plain attributes, as they are now.

    Args:
        places: which.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self._values: list[tuple[Any, str, Value | None]] = []
        for place in places:
            holder, name = place.holder, place.name
            if holder is not None:
                there = vars(holder)
                self._values.append((holder, name, Value(there[name]) if name in there else None))

    @classmethod
    def before(cls, changed: Iterable[tuple[Place, Value | None]]) -> AttributeValues:
        """Those that `AllAttributes.changed` has found to change, as they were."""
        some = cls(())
        some._values = [(place.holder, place.name, value) for place, value in changed]
        return some

    def restore(self) -> None:
        """Puts them back."""
        for holder, name, value in self._values:
            there = vars(holder)
            if value is not None:
                there[name] = value.put_back()
            else:
                there.pop(name, None)


class AllAttributes:
    """All plain attributes of some objects, as they are now, to see which of them change.

    Args:
        holders: the objects, each with its name for messages.
    """

    def __init__(self, holders: Sequence[tuple[str, Any]]) -> None:
        self._held = [
            (called, holder, {name: Value(vars(holder)[name]) for name in plain_names(holder)})
            for called, holder in holders
        ]

    def changed(self) -> list[tuple[Place, Value | None]]:
        """Which have changed since, come or gone, with what they held (None: nothing was there)."""
        found: list[tuple[Place, Value | None]] = []
        for called, holder, values in self._held:
            there = vars(holder)
            for name in plain_names(holder) | values.keys():
                value = values.get(name)
                if value is None or name not in there or value.differs(there[name]):
                    found.append((Place(holder, name, f"{called}.{name}"), value))
        return found


def _are(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists have the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or tensor.is_leaf and tensor.requires_grad


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in others: a DTensor's, those within torch.func's functions,
    which can't be copied once these have ended.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or is_traceable_wrapper_subclass(tensor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def same_bits(some: Tensor, others: Tensor) -> bool:
    """Whether two tensors agree in shape, type and every bit; for types that have no comparison
    too (8-bit floats). Waits for the device.
    """
    alike = some.shape == others.shape and some.dtype == others.dtype
    return alike and torch.equal(_bits(some), _bits(others))


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.int_repr() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()
    return plain.reshape(-1).contiguous().view(torch.uint8)
