"""The ops of a quasi-Newton step: along the tracked eigenvectors, each at its own rate.

Buffers, panels, segments and states are those of `lyapcuda.ops.step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lyapcuda.ops.library import compiled, fake, mark_written

__all__ = ["descend_", "slopes_"]


def slopes_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    offsets: Sequence[int],
    panel: Tensor,
    state: Tensor,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Returns the slopes along the rows of a panel: their products with what a step goes along.

    Args:
        theta: the parameters.
        gradient: like ``theta``.
        offsets: of both in ``panel`` and ``buffer``.
        panel: (k, n), the d of the last step.
        state: of k separations.
        weight_decay, momentum, nesterov: as for `descend_`.
        buffer: as for `descend_`; written.
        factor: float64, one element; where it isn't finite there is no step.

    Returns:
        float64 (k,). Zeros where no transform is pending, and where there is no step: then the
        buffer, too, stays.
    """
    mark_written(buffer)
    return compiled("slopes_")(
        theta,
        gradient,
        offsets,
        panel,
        state,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        buffer=buffer,
        factor=factor,
    )


fake(
    "slopes_",
    lambda theta, gradient, offsets, panel, state, **options: state.new_empty(panel.shape[0]),
)


def descend_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    state: Tensor,
    *,
    gain: float = 1.0,
    max_lr: float = 10.0,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer: Tensor | None = None,
    offsets: Sequence[int] | None = None,
    factor: Tensor | None = None,
    panel: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Steps down: ``theta −= rate·u``, ``u = gradient + weight_decay·theta``; returns the rates.

    Without a panel ``rate = factor·gain·min(1/h_ema, max_lr)``, and ``factor·gain·max_lr`` where
    h_ema ≤ 0. With one the eigenvectors ``q_j = Σ_i d_i·transform[i][j]`` have rates of their own:
    ``theta −= rate·u + Σ_j (rate_j − rate)·q_j·(q_j·u)/Δq²``, ``rate_j = factor·gain·min(1/c_j,
    max_lr)``, ``c_j = max(|h_ema_j|, c)``, and off them ``rate`` with ``c = |h_ema_(k−1)| +
    residual_(k−1)``. Where no transform is pending (the copies met) ``rate`` is the smallest of
    all.

    Args:
        theta: the parameters, written.
        gradient: like ``theta``.
        state: of one separation; with a panel, of its k.
        gain: learning rate times curvature.
        max_lr: bound of 1/curvature.
        weight_decay: of the loss ½·weight_decay·‖θ‖², which the gradient leaves out.
        momentum: m of torch.optim.SGD; used where there is a buffer.
        nesterov: step along ``u + momentum·buffer``; otherwise along the buffer.
        buffer: a flat buffer: becomes ``momentum·buffer + u``. With a panel `slopes_` has done
            that, and it is only read.
        offsets: of ``theta`` in buffer and panel.
        factor: float64, one element, on the device; 1 where it isn't given.
        panel: (k, n), the d of the last step; with ``slopes`` or not at all.
        slopes: float64 (k,), what `slopes_` returned with the same arguments, summed over all
            groups.

    Returns:
        rate, 0-dim float64; with a panel (k + 1,): rate_0 … rate_(k−1) and rate. Zeros, with theta
        and buffer untouched, where the last step, the factor or a slope was not finite.
    """
    mark_written(buffer if panel is None else None, *theta)
    return compiled("descend_")(
        theta,
        gradient,
        state,
        gain=gain,
        max_lr=max_lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        buffer=buffer,
        offsets=offsets,
        factor=factor,
        panel=panel,
        slopes=slopes,
    )


def _rates(
    theta: Tensor, gradient: Tensor, state: Tensor, *, panel: Tensor | None = None, **options: Any
) -> Tensor:
    return state.new_empty(() if panel is None else (panel.shape[0] + 1,))


fake("descend_", _rates)
