"""The state of k separations: the float64 numbers that a step decides, in one vector on the device.

csrc/scalars/state.h says what each field is. Scalars come first, then vectors of k, then k×k
matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lyapcuda import _C
from lyapcuda.arguments import described

__all__ = [
    "ESTIMATES",
    "MAX_K",
    "OF_ONE_STEP",
    "OF_QUOTIENTS",
    "new_state",
    "state_field",
    "state_fields",
]

#: Separations that one state may have, at most.
MAX_K: int = _C.max_k
#: How `h` is read off a step, by name, as the ops number them.
ESTIMATES = {"rayleigh": 0, "growth": 1, "paper": 2, "schwarz": 3, "secant": 4, "outer": 5}
#: Those that q and y alone tell, whatever the rate of the map. The others are read off its growth.
OF_QUOTIENTS = ("rayleigh", "schwarz", "secant", "outer")
#: Those of the last step alone, not the mean of both sides of θ.
OF_ONE_STEP = OF_QUOTIENTS[1:]

_FIELDS = {k: _C.state_fields(k) for k in range(1, MAX_K + 1)}
#: Fields of a new state that are 0. All others are NaN, but see `new_state`.
_ZERO = (
    *(
        "bound",
        "guard",
        "pending",
        "again",
        "accepted",
        "steps",
        "skipped",
        "reseed",
        "reseeds",
        "refined",
    ),
    "transform",
)


def state_fields(k: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name → (offset, shape) of every field in the state of k separations, in order.

    Raises:
        ValueError: k outside 1 to 32.
    """
    if not isinstance(k, int) or k not in _FIELDS:
        raise ValueError(f"k={described(k)}: expected 1 to {MAX_K}")
    return _FIELDS[k]


def state_field(state: Tensor, k: int, name: str) -> Tensor:
    """One field of a state, as a view: (1,) for a scalar, (k,) or (k, k).

    One element is what the ``gate`` of `lyapcuda.ops.gram` and `lyapcuda.ops.combine_` takes.
    """
    offset, shape = state_fields(k)[name]
    return state[offset : offset + math.prod(shape)].view(shape or (1,))


def new_state(device: torch.device | str, k: int = 1, **values: float | Tensor) -> Tensor:
    """The state of k separations on ``device``, with the given fields.

    Counters, ``bound``, ``guard``, ``pending``, ``again``, ``reseed`` and the transform are 0,
    ``displacement`` 1, everything unmeasured NaN. For k = 1 ``pending`` and the transform are 1:
    the separation is q itself.

    Args:
        device: where it lies.
        k: separations, 1 to 32.
        values: field → a number that fills it, or a tensor of its shape.

    Raises:
        ValueError: k outside 1 to 32, a field that there isn't.
    """
    fields = state_fields(k)
    unknown = set(values) - set(fields)
    if unknown:
        raise ValueError(f"unknown state fields: {sorted(unknown)}")
    size = sum(math.prod(shape) for _, shape in fields.values())
    state = torch.full((size,), math.nan, dtype=torch.float64)
    whole = {"displacement": 1.0} | ({"pending": 1.0, "transform": 1.0} if k == 1 else {})
    for name, value in {**dict.fromkeys(_ZERO, 0.0), **whole, **values}.items():
        state_field(state, k, name)[...] = value
    return state.to(device)
