"""The ops of a product H·v by differences of gradients: displace the copies, take the difference.

Buffers and segments are those of `lyapcuda.ops.step`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lyapcuda.ops.library import compiled, fake, mark_written

__all__ = ["difference_", "displace_"]


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
