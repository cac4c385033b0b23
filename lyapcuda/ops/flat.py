"""The compiled ops over flat buffers, `torch.ops.lyapcuda.*`: what each computes.

All of them work on the buffers of one tracker, in float32 or float64, and read 16-bit gradients and
parameters directly. A *flat buffer* is a contiguous 1-D tensor; a list of tensors beside it lies at
the given element ``offsets``. ``state`` is the float64 vector described in ``csrc/state.h`` (its
names: `STATE_FIELDS`), ``sums`` a float64 vector with the fields `SUM_FIELDS`. Sums are accumulated
in float64 in an order fixed by the sizes alone: reruns are bit-identical on any number of threads.
The fp64 oracle of every op has the same name in `lyapcuda.ops.reference`. The ops over several
separations at once are in `lyapcuda.ops.panel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lyapcuda import _C
from lyapcuda.ops.library import compiled, mark_written

__all__ = [
    "ESTIMATES",
    "OF_QUOTIENTS",
    "STATE_FIELDS",
    "SUM_FIELDS",
    "ascent_",
    "build_info",
    "descend_",
    "difference_",
    "displace_",
    "exponent_",
    "new_state",
    "recenter_",
    "reseed_",
    "secant_",
    "stream_copy_",
]

#: Fields of the state vector, in order.
STATE_FIELDS: tuple[str, ...] = tuple(_C.state_fields())
#: Fields of the vector that `ascent_` returns, in order.
SUM_FIELDS = ("dd", "qq", "qy", "yy", "carried_q", "carried_y")
#: Fields of a new state that are 0.
ZERO_FIELDS = ("bound", "guard", "accepted", "steps", "skipped", "reseed", "reseeds")
#: How `h` is read off a step, by name, as the ops number them.
ESTIMATES = {"rayleigh": 0, "growth": 1, "paper": 2, "schwarz": 3}
#: Those that q and y alone tell, whatever the rate of the map; the others are read off its growth.
OF_QUOTIENTS = ("rayleigh", "schwarz")


def build_info() -> dict[str, object]:
    """How the extension was built and which instruction set it runs with."""
    return {**_C.build_info(), "threads": torch.get_num_threads()}


def new_state(device: torch.device | str, **values: float) -> Tensor:
    """A state vector on ``device`` with the given fields; counters 0, everything unmeasured NaN."""
    zero = dict.fromkeys(ZERO_FIELDS, 0.0)
    zero["committed"] = 1.0
    unknown = set(values) - set(STATE_FIELDS)
    if unknown:
        raise ValueError(f"unknown state fields: {sorted(unknown)}")
    filled = [{**zero, **values}.get(name, float("nan")) for name in STATE_FIELDS]
    return torch.tensor(filled, dtype=torch.float64, device=device)


# --- ascent_ -------------------------------------------------------------------------------------


def ascent_(
    d: Tensor,
    q: Tensor,
    g0: Sequence[Tensor],
    g1: Sequence[Tensor],
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
    """Steps both copies along their gradients, as seen from their separation.

    ``d = scale·q + sign·β·w`` with ``w = momentum·scale·p + y`` (written to ``p_next``) and
    ``y = g1 − g0 + weight_decay·moved``, in one pass that also returns the sums of `SUM_FIELDS`.
    ``moved`` is ``scale·q``, or where ``theta`` is given the displacement that `recenter_` realised
    when it rounded ``theta + scale·q`` to the parameters' dtype. ``d`` may be ``q`` itself, and may
    share memory with the gradients at the same offsets.
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
    )


# --- exponent_, secant_ --------------------------------------------------------------------------


def exponent_(
    state: Tensor,
    sums: Tensor,
    losses: Tensor,
    *,
    sign: int = 1,
    estimate: int = 0,
    momentum: float = 0.0,
    control: bool = True,
    alternate: bool = True,
    ema: float = 0.0,
) -> None:
    """Takes the sums of a pass into the state: λ, the next β, h, its average and its error bar.

    ``losses`` is a float64 vector that has to be finite for the step to count. With ``control`` β
    follows the curvature (the paper's β/λ for its own estimate, the secant (e − 1)‖q‖/‖y‖
    otherwise); ``alternate`` flips the side of the separation. Nothing is read back to the host.
    Where the separation is lost (q is nothing, or the copies met under a β that stays) the state
    asks for another: see `reseed_`.
    """
    mark_written(state)
    compiled("exponent_")(
        state,
        sums,
        losses,
        sign=sign,
        estimate=estimate,
        momentum=momentum,
        control=control,
        alternate=alternate,
        ema=ema,
    )


def secant_(state: Tensor, sums: Tensor, *, sign: int = 1) -> None:
    """Sets β alone from the sums of a pass: the start of a run, before anything was measured."""
    mark_written(state)
    compiled("secant_")(state, sums, sign=sign)


# --- recenter_ -----------------------------------------------------------------------------------


def recenter_(
    theta1: Sequence[Tensor],
    q: Tensor,
    q_previous: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    state: Tensor,
    *,
    p: Tensor | None = None,
    p_previous: Tensor | None = None,
) -> None:
    """``theta1 = theta + scale·q``, rounded to the parameters' dtype.

    Where the state says that the last step was not committed, ``q`` is first taken back from
    ``q_previous``, and the momentum ``p``, if given, from ``p_previous``; else neither of these is
    read. ``theta1`` may be views of ``q_previous`` at the same offsets.
    """
    mark_written(q, p, *theta1)
    compiled("recenter_")(theta1, q, q_previous, theta, offsets, state, p=p, p_previous=p_previous)


# --- reseed_ -------------------------------------------------------------------------------------


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
        panel: the separation that `exponent_` said is kept, a flat buffer, with the state of one;
            or (k, n), of whose rows `benettin_` said which, with the state of k.
        offsets, sizes: the segments, in order; nothing else is written.
        elements: of the segments of all groups, which share the norm Δq.
        seed: with the number of steps taken, of the pseudo-random numbers, which are the same on
            every backend.
        p: the momentum like ``panel``; of a new separation it is 0.
    """
    mark_written(panel, p)
    compiled("reseed_")(panel, offsets, sizes, state, elements=elements, seed=seed, p=p)


# --- descend_ ------------------------------------------------------------------------------------


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
) -> Tensor:
    """``theta −= lr·u``, ``lr = factor·gain·min(1/h_ema, max_lr)``, along ``u = gradient +
    weight_decay·theta``.

    Args:
        buffer: a flat buffer with the segments of ``theta`` at ``offsets``: becomes
            ``momentum·buffer + u``, and is what the step goes along; with ``nesterov`` that is
            ``u + momentum·buffer``.
        factor: float64, one element, on the device; 1 where it isn't given.

    Returns:
        lr (0-dim float64): ``factor·gain·max_lr`` where h_ema ≤ 0, and 0, with theta and buffer
        untouched, where the last step, or the factor, was not finite.
    """
    mark_written(buffer, *theta)
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
    )


# --- displace_, difference_ ----------------------------------------------------------------------


def displace_(
    copies: Sequence[Tensor],
    v: Tensor,
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    step: Tensor,
) -> Tensor:
    """``copies = theta + step·v``, rounded to the parameters' dtype.

    Args:
        copies: tensors like ``theta``, written.
        v: a flat buffer.
        theta: the parameters, at ``offsets`` of ``v``.
        step: float64, one element, on the device.

    Returns:
        float64 (2,): Σ v·(copies − theta) and Σ v². The displacement realised along v, as a part of
        ``step``, is the first over the second over ``step``.
    """
    mark_written(*copies)
    return compiled("displace_")(copies, v, theta, offsets, step)


def difference_(
    out: Tensor,
    plus: Sequence[Tensor],
    minus: Sequence[Tensor],
    offsets: Sequence[int],
    scale: Tensor,
    *,
    keep: float = 0.0,
    weight_decay: float = 0.0,
    v: Tensor | None = None,
) -> None:
    """``out = scale·(plus − minus) + weight_decay·v + keep·out`` over the segments.

    ``scale`` is float64, one element, on the device; ``weight_decay`` needs ``v``, a flat buffer
    like ``out``. Where ``keep`` is 0 the old ``out`` isn't read. ``out`` may share memory with
    ``plus`` or ``minus`` at the same offsets.
    """
    mark_written(out)
    compiled("difference_")(
        out, plus, minus, offsets, scale, keep=keep, weight_decay=weight_decay, v=v
    )


# --- stream_copy_ --------------------------------------------------------------------------------


def stream_copy_(destination: Tensor, source: Tensor) -> None:
    """Copies one flat buffer to another: the bandwidth the other ops are measured against."""
    mark_written(destination)
    compiled("stream_copy_")(destination, source)
