"""The ops of a step of k separations, for any k from 1 to 32.

A *flat buffer* is a contiguous 1-D tensor in float32 or float64. Tensors that a list gives lie at
the given element ``offsets`` of it; these are its segments, and 16-bit gradients and parameters are
read as they are. A *panel* is k flat buffers, the rows of a contiguous (k, n) tensor; for k = 1 it
is (1, n). ``state`` is that of `lyapcuda.ops.state`. Wrong shapes, dtypes or devices are a
RuntimeError that names the argument, before anything changes.

A step, per group of parameters where a panel is an argument:

    recenter_(q, copies, d, theta, offsets, state)         # the user's gradients at the copies: g1
    gram = ascent_(d, q, g0, g1, offsets, state)           # summed over the groups
    benettin_(state, gram, losses, k)
    combine_(d, d, transform, gate=again)                  # again, transform: views of the state
    benettin_refine_(state, gram(d, d, gate=again), k)
    reseed_(q, offsets, sizes, state, elements=...)

For k > 1 the separations are the rows of q, and `recenter_` writes the next ones there: q_j =
``Σ_i d_i·transform[i][j]``, where ``pending`` says so. For k = 1 nothing is rewritten: the
separation is ``transform·q``, and the momentum ``transform·p``. After `benettin_` the caller swaps
q and d, p and p_next. Where ``pending`` is then 0 the step wasn't taken, and `recenter_` takes q
and p back from d and p_next, where they were. The two ops of the second pass, `combine_` and
`benettin_refine_`, have nothing to do for k = 1.

With a diagonal *metric* S, a flat buffer that all rows share, a separation is q_j in the
coordinates where the curvature is S·H·S, and its copy lies at θ + displacement_j·S∘q_j.
``displacement``, of the state, makes the Euclidean norm of what is added to θ that of q_j: from
``displaced``, which is ``gram(d, d, weights=S)`` summed over the groups, `benettin_` finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lyapcuda.ops.library import compiled, fake, mark_written

__all__ = ["ascent_", "benettin_", "benettin_refine_", "recenter_", "reseed_"]


def ascent_(
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
    metric: Tensor | None = None,
) -> Tensor:
    """Steps k copies along their gradients: writes their next separations, returns a Gram matrix.

    ``d_j = q_j + sign·β·w_j`` with ``w_j = momentum·p_j + y_j`` (written to ``p_next``) and
    ``y_j = g1_j − g0 + weight_decay·moved_j``. ``moved`` is ``q``, or where ``theta`` is given the
    displacement that `recenter_` realised. For k = 1, q and p are taken times the transform.

    With a ``metric`` S it is ``y_j = S·(g1_j − g0 + weight_decay·moved_j)/displacement_j``, where
    ``moved_j = displacement_j·S·q_j`` or what was realised of it. The Gram matrix has what was
    realised as a separation again, ``moved_j/(displacement_j·S)``: 0 where S is 0.

    Args:
        d: (k, n), written over the segments. May be ``q``, or lie where ``g1`` does and have its
            dtype.
        q: (k, n), the separations.
        g0: the gradients at θ, at ``offsets``.
        g1: (k, n) in the dtype of ``g0``; row j is the flat gradient at θ + q_j.
        offsets: of the segments.
        state: of k separations; β is read, for k = 1 the transform too.
        sign: 1 climbs, −1 descends.
        weight_decay: of the loss ½·weight_decay·‖θ‖², which the gradients leave out.
        theta: the parameters, where their dtype rounds θ + q.
        momentum: m of the heavy-ball map; above 0 it needs ``p``.
        p: (k, n), the momentum of every separation; with ``p_next`` or not at all.
        p_next: (k, n), written over the segments.
        metric: (n,) in the dtype of ``q``; not with ``p``. May be 0 in places.

    Returns:
        float64 (m·k, m·k): the Gram matrix, over the segments, of the rows of q (for k = 1
        transform·q); y; moved where ``theta`` is given; d where ``p`` is. Where an element of d may
        not fit its dtype, a diagonal entry of y is infinite, which `benettin_` refuses.
    """
    mark_written(d, p_next)
    return compiled("ascent_")(
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
        metric=metric,
    )


def _stacked_gram(
    d: Tensor,
    q: Tensor,
    g0: Tensor,
    g1: Tensor,
    offsets: Sequence[int],
    state: Tensor,
    *,
    theta: Tensor | None = None,
    p: Tensor | None = None,
    **options: Any,
) -> Tensor:
    rows = (2 + (theta is not None) + (p is not None)) * q.shape[0]
    return state.new_empty(rows, rows)


fake("ascent_", _stacked_gram)


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
    displaced: Tensor | None = None,
) -> None:
    """Takes the Gram matrix of a pass into the state: Ritz values, exponents, the next transform.

    A step that isn't finite only counts itself as skipped. Where the copies met there is no
    transform (``pending`` 0) and β is halved. Where β isn't ours to control, or a separation lies
    in the span of the others, the state asks for another in its place: see `reseed_`. With β = 0
    a step only measures, and makes the separations orthogonal; its exponents are those that the
    next step's β would have had. Nothing is read back to the host.

    Args:
        state: of k separations, written.
        gram: what `ascent_` returned, summed over all groups.
        losses: float64; the step counts only if they, too, are finite.
        k: separations.
        sign: 1 takes Ritz values from the largest down, −1 from the smallest up.
        estimate: what h is, a value of `lyapcuda.ops.ESTIMATES`.
        momentum: as for `ascent_`; above 0 the Gram matrix has d.
        realised: whether it has moved.
        control: let β follow the curvature: the paper's β/λ for its own estimate, otherwise
            (e − 1) over the largest secant ‖y‖/‖q‖.
        alternate: take the next separations to the other side of θ.
        rotate: make orthogonal along the Ritz vectors; False: in the order of the rows.
        ema: weight of the past in ``h_ema``.
        displaced: float64 (k, k), the Gram matrix of the rows S∘d_i. Where it is given and the
            copies parted, every ``displacement`` becomes what takes the next S∘q_j to the norm Δq;
            one that isn't finite and positive stays.
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
        displaced=displaced,
    )


def benettin_refine_(state: Tensor, gram: Tensor, k: int) -> None:
    """Takes the second pass of orthonormalisation into the state, where that asks for it.

    It asks with ``again``. ``r`` and the exponents are corrected; the transform becomes what is
    left to apply.

    Args:
        state: of k separations, written.
        gram: float64 (k, k), of d after the transform was applied to it.
        k: separations.
    """
    mark_written(state)
    compiled("benettin_refine_")(state, gram, k)


def recenter_(
    q: Tensor,
    copies: Tensor,
    d: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
    *,
    p: Tensor | None = None,
    p_next: Tensor | None = None,
    metric: Tensor | None = None,
) -> None:
    """Writes the next separations to q, and every ``θ + q_j``, rounded, to the copies.

    For k > 1: ``q_j = Σ_i d_i·transform[i][j]`` where that is pending, ``p`` likewise from
    ``p_next``, and ``copies_j = theta + q_j``. For k = 1: ``q = d`` and ``p = p_next`` where
    nothing is pending, and ``copies = theta + transform·q``. The state is not changed: once all
    groups are done the caller sets ``pending`` to what it is for a step that hasn't begun.

    Args:
        q: (k, n), written over the segments where this says so.
        copies: (k, n) in the parameters' dtype, written over the segments. May lie where ``d`` does
            and have its dtype.
        d: (k, n); shares no memory with ``q``.
        theta: the parameters, at ``offsets``.
        offsets: of the segments.
        state: of k separations.
        p, p_next: (k, n), both or neither: as q and d. For k > 1 whole rows of p are written.
        metric: (n,) in the dtype of ``q``, S; not with ``p``. What is added to θ is then taken
            times displacement_j·S.
    """
    mark_written(q, copies, p)
    compiled("recenter_")(q, copies, d, theta, offsets, state, p=p, p_next=p_next, metric=metric)


def reseed_(
    panel: Tensor,
    offsets: Sequence[int],
    sizes: Sequence[int],
    state: Tensor,
    *,
    elements: int,
    seed: int = 0,
    p: Tensor | None = None,
) -> None:
    """Puts another separation where the state says that one was lost; else does nothing.

    Args:
        panel: (k, n), the separations that are kept: q, for k = 1 d after the swap. The row that
            `benettin_` named is written over the segments.
        offsets: of the segments, in order.
        sizes: how many elements each has.
        state: of k separations.
        elements: of the segments of all groups, which share the norm Δq.
        seed: with the number of steps taken, of the pseudo-random numbers, which are the same on
            every backend.
        p: the momentum like ``panel``; of a new separation it is 0.
    """
    mark_written(panel, p)
    compiled("reseed_")(panel, offsets, sizes, state, elements=elements, seed=seed, p=p)
