"""TF32 on the CPU: float32 products whose operands are rounded to 10 bits of mantissa."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lyapcuda.objective import tf32

aten = torch.ops.aten

#: The operands of each product among its arguments; what is added to it stays as it is.
OPERANDS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.addbmm.default: (1, 2),
    aten.linear.default: (0, 1),
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
}
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def rounded(x: Tensor) -> Tensor:
    """x to the nearest number of 10 bits of mantissa, to even between two."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def truncated(x: Tensor) -> Tensor:
    """x without the last 13 bits of its mantissa."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


class Rounding(TorchDispatchMode):
    """Rounds the operands of float32 products, in the forward and in the backward pass."""

    def __init__(
        self, to: Callable[[Tensor], Tensor] = rounded, convolutions_only: bool = False
    ) -> None:
        super().__init__()
        self._to, self._only = to, convolutions_only
        #: How many products were rounded.
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        places = OPERANDS.get(func, ())
        if places and args[places[0]].dtype == torch.float32:
            if not self._only or func in CONVOLUTIONS:
                args = tuple(self._to(a) if i in places else a for i, a in enumerate(args))
                self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated(to: Callable[[Tensor], Tensor] = rounded, *, known: bool = True) -> Iterator[Rounding]:
    """Rounds within, and has the package take the CPU for a device with TF32 where ``known``.

    The flags are torch's: convolutions by default, matrix products where the user allows them.
    """
    only = torch.backends.cuda.matmul.fp32_precision != "tf32"
    rounding = Rounding(to, convolutions_only=only)
    with mock.patch.object(tf32, "has_tf32", lambda device: known), rounding:
        yield rounding
