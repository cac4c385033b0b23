"""The compiled ops over panels: k vectors at once, one a row of a contiguous (k, n) tensor.

Every row is a flat buffer, in float32 or float64, with the segments of `lyapcuda.ops` at the same
``offsets``. A panel of separations has 1 to 32 rows; `gram`, `combine_` and `project_` take up to
128. ``state`` is the float64 vector of csrc/panel_state.h (its fields: `panel_fields`). Gram
matrices are float64, summed in an order fixed by the sizes alone. The fp64 oracle of every op has
the same name in `lyapcuda.ops.panel_reference`. Wrong shapes, dtypes or devices are a RuntimeError
that names the argument, before anything changes.

A step of k separations, per group of parameters where a panel is an argument:

    gram = panel_ascent_(d, q, g0, g1, offsets, state)     # summed over the groups
    benettin_(state, gram, losses, k)
    combine_(d, d, transform, gate=again)                  # again, transform: views of state
    benettin_refine_(state, gram(d, d, gate=again), k)
    reseed_(q, offsets, sizes, state, elements=...)        # of lyapcuda.ops
    panel_recenter_(q, copies, d, theta, offsets, state)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lyapcuda import _C
from lyapcuda.ops.flat import ZERO_FIELDS
from lyapcuda.ops.library import compiled, mark_written

__all__ = [
    "MAX_PANEL",
    "benettin_",
    "benettin_refine_",
    "combine_",
    "gram",
    "new_panel_state",
    "panel_ascent_",
    "panel_descend_",
    "panel_field",
    "panel_fields",
    "panel_recenter_",
    "panel_slopes_",
    "project_",
]

#: Separations that a panel may have, at most.
MAX_PANEL: int = _C.max_panel
_FIELDS = {k: _C.panel_fields(k) for k in range(1, MAX_PANEL + 1)}
#: Fields of a new panel state that are 0; all others, but the transform, are NaN.
_ZERO = (*ZERO_FIELDS, "pending", "again", "transform")


def panel_fields(k: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name → (offset, shape) of every field in the state of k separations, in order.

    Raises:
        ValueError: k outside 1 to 32.
    """
    if k not in _FIELDS:
        raise ValueError(f"k={k!r}: expected 1 to {MAX_PANEL}")
    return _FIELDS[k]


def panel_field(state: Tensor, k: int, name: str) -> Tensor:
    """One field of a panel state, as a view: one element, (k,) or (k, k).

    A scalar comes as a tensor of one element, which is what the ``gate`` of `gram` and `combine_`
    takes.
    """
    offset, shape = panel_fields(k)[name]
    return state[offset : offset + math.prod(shape)].view(shape or (1,))


def new_panel_state(device: torch.device | str, k: int, **values: float | Tensor) -> Tensor:
    """The state of k separations on ``device``, with the given fields.

    Counters, ``bound``, ``guard``, ``pending``, ``again``, ``reseed`` and the transform are 0,
    everything unmeasured NaN. A value fills its whole field, or is a tensor of the field's shape.

    Raises:
        ValueError: k outside 1 to 32, a field that there isn't.
    """
    fields = panel_fields(k)
    unknown = set(values) - set(fields)
    if unknown:
        raise ValueError(f"unknown panel state fields: {sorted(unknown)}")
    size = sum(math.prod(shape) for _, shape in fields.values())
    state = torch.full((size,), math.nan, dtype=torch.float64)
    for name, value in {**dict.fromkeys(_ZERO, 0.0), **values}.items():
        panel_field(state, k, name)[...] = value
    return state.to(device)


# --- a step --------------------------------------------------------------------------------------


def panel_ascent_(
    d: Tensor,
    q: Tensor,
    g0: Sequence[Tensor],
    g1: Tensor,
    offsets: Sequence[int],
    state: Tensor,
    *,
    sign: int = 1,
    weight_decay: float = 0.0,
    theta: Sequence[Tensor] | None = None,
    momentum: float = 0.0,
    p: Tensor | None = None,
    p_next: Tensor | None = None,
) -> Tensor:
    """Steps k copies along their gradients, as seen from their separations.

    ``d_j = q_j + sign·β·w_j`` with ``w_j = momentum·p_j + y_j`` (written to ``p_next``) and
    ``y_j = g1_j − g0 + weight_decay·moved_j``. ``moved`` is ``q``, or where ``theta`` is given the
    displacement that `panel_recenter_` realised.

    Args:
        d: (k, n), written over the segments. May be ``q``, or lie where ``g1`` does
            and have its dtype.
        q: (k, n), the separations.
        g0: the gradients at θ, at ``offsets``.
        g1: (k, n) in the dtype of ``g0``: row j is the flat gradient at θ + q_j.
        state: of k separations; β is read.
        p, p_next: (k, n), both or neither; ``momentum`` needs them.

    Returns:
        float64 (m·k, m·k): the Gram matrix, over the segments, of the rows of q; y; moved where
        ``theta`` is given; d where ``p`` is. Where an element of d may not fit its dtype a diagonal
        entry is infinite, which `benettin_` refuses.
    """
    mark_written(d, p_next)
    return compiled("panel_ascent_")(
        d,
        q,
        g0,
        g1,
        offsets,
        state,
        sign=sign,
        weight_decay=weight_decay,
        theta=theta,
        momentum=momentum,
        p=p,
        p_next=p_next,
    )


def benettin_(
    state: Tensor,
    gram: Tensor,
    losses: Tensor,
    k: int,
    *,
    sign: int = 1,
    estimate: int = 0,
    momentum: float = 0.0,
    realised: bool = False,
    control: bool = True,
    alternate: bool = True,
    rotate: bool = True,
    ema: float = 0.0,
) -> None:
    """Takes the Gram matrix of a pass into the state: Ritz values, exponents, the next transform.

    Args:
        state: of k separations, written.
        gram: what `panel_ascent_` returned, summed over all groups; ``realised`` and
            ``momentum > 0`` say which blocks it has.
        losses: float64; the step counts only if they, too, are finite.
        sign: 1 takes Ritz values from the largest down, −1 from the smallest up.
        estimate, control, alternate, ema: as for `exponent_`; β follows the largest secant.
        rotate: orthonormalise along the Ritz vectors; False: in the order of the rows.

    A step that isn't finite only counts itself as skipped. Where the copies met there is no
    transform (``pending`` 0) and β is halved; where β isn't ours to control, or a separation lies
    in the span of the others, the state asks for another in its place: see `reseed_`. Nothing
    is read back to the host.
    """
    mark_written(state)
    compiled("benettin_")(
        state,
        gram,
        losses,
        k,
        sign=sign,
        estimate=estimate,
        momentum=momentum,
        realised=realised,
        control=control,
        alternate=alternate,
        rotate=rotate,
        ema=ema,
    )


def benettin_refine_(state: Tensor, gram: Tensor, k: int) -> None:
    """The second pass of orthonormalisation, where the state asks for it (``again``).

    ``gram`` (float64, (k, k)) is that of d after the transform was applied to it. Corrects ``r``
    and the exponents; the transform becomes what is left to apply.
    """
    mark_written(state)
    compiled("benettin_refine_")(state, gram, k)


def panel_recenter_(
    q: Tensor,
    copies: Tensor,
    d: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
) -> None:
    """``q_j = Σ_i d_i·transform[i][j]`` where that is pending, and ``copies_j = theta + q_j``.

    ``q`` and ``d`` are (k, n), ``copies`` (k, n) in the parameters' dtype; only the segments are
    written. ``copies`` may lie where ``d`` does, with its dtype; ``q`` shares memory with neither.
    The state is not changed: clear ``pending`` once all groups are done.
    """
    mark_written(q, copies)
    compiled("panel_recenter_")(q, copies, d, theta, offsets, state)


# --- the quasi-Newton step -----------------------------------------------------------------------


def panel_slopes_(
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
    """The slopes along the rows of a panel: products with ``u = gradient + weight_decay·theta``.

    Args:
        panel: (k, n), the d of the last step, with ``theta`` at ``offsets`` of every row.
        state: of k separations.
        buffer, momentum, nesterov: as for `descend_`; the buffer is written.
        factor: float64, one element; where it isn't finite there is no step.

    Returns:
        float64 (k,). Zeros where no transform is pending, and where there is no step: then the
        buffer, too, stays.
    """
    mark_written(buffer)
    return compiled("panel_slopes_")(
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


def panel_descend_(
    theta: Sequence[Tensor],
    gradient: Sequence[Tensor],
    offsets: Sequence[int],
    panel: Tensor,
    state: Tensor,
    slopes: Tensor,
    *,
    gain: float = 1.0,
    max_lr: float = 10.0,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    buffer: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """``theta −= rate·u + Σ_j (rate_j − rate)·q_j·(q_j·u)/Δq²``, ``q_j = Σ_i d_i·transform[i][j]``.

    ``rate_j = factor·gain·min(1/c_j, max_lr)``, ``c_j = max(|h_ema_j|, c)``, and off the tracked
    directions ``rate`` with ``c = |h_ema_(k−1)| + residual_(k−1)``. Where no transform is pending
    (the copies met) ``rate`` is the smallest of all.

    Args:
        slopes: what `panel_slopes_` returned with the same arguments, summed over all groups.
        buffer: as `panel_slopes_` left it.

    Returns:
        float64 (k + 1,): rate_0 … rate_(k−1) and rate; zeros, with theta untouched, where the last
        step, a slope or the factor was not finite.
    """
    mark_written(*theta)
    return compiled("panel_descend_")(
        theta,
        gradient,
        offsets,
        panel,
        state,
        slopes,
        gain=gain,
        max_lr=max_lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        buffer=buffer,
        factor=factor,
    )


# --- panels as matrices --------------------------------------------------------------------------


def gram(a: Tensor, b: Tensor, *, gate: Tensor | None = None) -> Tensor:
    """``a·bᵀ`` in float64: (ka, kb) for a (ka, n) and b (kb, n). Symmetric where b is a.

    ``gate``: float64, one element; where it is 0 the result is zeros and nothing is read.
    """
    return compiled("gram")(a, b, gate=gate)


def combine_(out: Tensor, panel: Tensor, matrix: Tensor, *, gate: Tensor | None = None) -> None:
    """``out_j = Σ_i panel_i·matrix[i][j]``: out (ko, n), panel (ki, n), matrix float64 (ki, ko).

    ``out`` may start where ``panel`` does if it has no more rows; any other overlap is an error.
    Where ``gate`` (float64, one element) is 0, ``out`` stays.
    """
    mark_written(out)
    compiled("combine_")(out, panel, matrix, gate=gate)


def project_(w: Tensor, v: Tensor, coefficients: Tensor) -> Tensor:
    """``w −= Σ_i coefficients[i]·v_i`` for w (n,), v (m, n), coefficients float64 (m,).

    m may be 0. Returns float64 (m + 1,): the products of the new w with every row of v, then w·w.
    """
    mark_written(w)
    return compiled("project_")(w, v, coefficients)
