"""Random vectors for estimates over the whole spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from lyapcuda.arguments import seed as check_seed
from lyapcuda.solvers.symmetric import SymmetricOperator

__all__ = ["RandomVectors"]


class RandomVectors:
    """Random vectors of an operator's size, from a generator of their own.

    Args:
        operator: whose size, dtype and device they have.
        seed: the global random states are not touched.
    """

    def __init__(self, operator: SymmetricOperator, seed: int) -> None:
        check_seed("seed", seed)
        self._n, self._dtype = operator.shape[0], operator.dtype
        self._device = operator.device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def normal(self, count: int) -> Tensor:
        """(count, n): standard normal, so independent of each other in any n of them."""
        shape = (count, self._n)
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)

    def signs(self, count: int) -> Tensor:
        """(count, n): every element 1 or −1 with equal chance (Rademacher)."""
        shape = (count, self._n)
        bits = torch.randint(
            0, 2, shape, generator=self._generator, device=self._device, dtype=torch.int8
        )
        return bits.to(self._dtype).mul_(2).sub_(1)
