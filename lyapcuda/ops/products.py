"""The ops of a product H·v by differences of gradients: displace the copies, take the difference,
or only its products with the direction.

Buffers and segments are those of `lyapcuda.ops.step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lyapcuda.ops.library import compiled, fake, mark_written

__all__ = ["difference_", "directional_products", "displace_"]


def displace_(
    copies: Sequence[Tensor],
    v: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    step: Tensor,
) -> Tensor:
    """Writes ``copies = theta + step·v``, rounded; returns how far they are from theta along v.

    Args:
        copies: tensors like ``theta``, written.
        v: a flat buffer.
        theta: the parameters, at ``offsets`` of ``v``.
        offsets: of the segments.
        step: float64, one element, on the device.

    Returns:
        float64 (2,): Σ v·(copies − theta) and Σ v². The displacement realised along v, as a part of
        ``step``, is the first over the second over ``step``.
    """
    mark_written(*copies)
    return compiled("displace_")(copies, v, theta, offsets, step)


fake("displace_", lambda copies, v, theta, offsets, step: step.new_empty(2))


def difference_(
    out: Tensor,
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor,
    *,
    weight_decay: float = 0.0,
    v: Tensor | None = None,
) -> None:
    """Writes ``out = scale·(plus − minus) + weight_decay·v`` over the segments.

    Args:
        out: a flat buffer, written. May share memory with ``plus`` or ``minus`` at the same
            offsets.
        plus, minus: gradients, at ``offsets``.
        offsets: of the segments.
        scale: float64, one element, on the device.
        weight_decay: needs ``v``.
        v: a flat buffer like ``out``.
    """
    mark_written(out)
    compiled("difference_")(out, plus, minus, offsets, scale, weight_decay=weight_decay, v=v)


def directional_products(
    u: Tensor, g0: Sequence[Tensor], g1: Sequence[Tensor], offsets: Sequence[int]
) -> Tensor:
    """Returns what two gradients say of a loss along a direction: its slope and its curvature.

    Args:
        u: a flat buffer.
        g0: the gradients at θ, at ``offsets`` of ``u``.
        g1: the same at θ + step·u.
        offsets: of the segments.

    Returns:
        float64 (3,): Σ u·g0, Σ u·(g1 − g0) and Σ u². The second over ``step`` is u·Hu.
    """
    return compiled("directional_products")(u, g0, g1, offsets)


fake(
    "directional_products",
    lambda u, g0, g1, offsets: u.new_empty(3, dtype=torch.float64),
)
