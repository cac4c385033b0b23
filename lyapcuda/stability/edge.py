"""Rates and thresholds of an optimizer's groups, folded into one number: how near the edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lyapcuda.stability.held import Held
from lyapcuda.stability.rules import Number, Rule

__all__ = ["Edge"]


class Edge:
    """Rates and thresholds at the latest step.

    At the onset of instability x = θ − θ* changes its sign at every step. In each group g then
    x_g = rate_g/threshold_g·P_g⁻¹·(Hx)_g. With the gains rate_g/threshold_g as parts of P⁻¹, that
    is one eigenvalue problem for all groups: it is at the edge when the largest eigenvalue is 1.
    Gains are relative to those of a reference, so that one rate leaves P as it is.

    Args:
        rule: of the optimizer.
        held: its groups; every parameter in them has started.
        device: of the result's tensors, where something isn't on the host.

    Attributes:
        uniform: whether all gains are known to be the same, without reading one.
        rate, threshold: those of the reference: the first parameter with a rate above 0.
        factors: (parameters,) gain by the reference's, in the order of ``held``; float64. All are
            1 where no rate is above 0.
    """

    def __init__(self, rule: Rule, held: Sequence[Held], device: torch.device) -> None:
        pairs = [(rule.rate(part), rule.threshold(part)) for part in held]
        self.uniform = all(_is_same(pair, pairs[0]) for pair in pairs)
        on_host = all(_is_on_host(number) for pair in pairs for number in pair)
        where = torch.device("cpu") if on_host else device
        sizes = [len(part.positions) for part in held]
        rates, thresholds = (
            torch.cat([_vector(x, size, where) for x, size in zip(numbers, sizes, strict=True)])
            for numbers in zip(*pairs, strict=True)
        )
        gains = rates / thresholds
        first = (gains > 0).to(torch.uint8).argmax()  # the first of the largest
        reference = gains.take(first)
        self.rate, self.threshold = rates.take(first), thresholds.take(first)
        self.factors = torch.where(reference > 0, gains / reference, 1.0)

    def of(self, h: Tensor) -> Tensor:
        """rate·h/threshold: 1 at the edge.

        Args:
            h: eigenvalues of S·H·S with the factors in S; of any shape.
        """
        return h * (self.rate / self.threshold).to(h.device)


def _is_same(pair: tuple[Number, Number], other: tuple[Number, Number]) -> bool:
    return all(
        a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)
        for a, b in zip(pair, other, strict=True)
    )


def _is_on_host(number: Number) -> bool:
    return not isinstance(number, Tensor) or number.device.type == "cpu"


def _vector(number: Number, size: int, device: torch.device) -> Tensor:
    """(size,) float64 on a device, from what may be one number."""
    if not isinstance(number, Tensor):
        return torch.full((size,), number, dtype=torch.float64, device=device)
    number = number.detach().double().reshape(-1).to(device, non_blocking=True)
    return number.expand(size)
