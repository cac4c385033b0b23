"""The oracles as a library of ops: they compute in float64, and write what the ops would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from lyapcuda.ops import reference


def _write(panel: Tensor, offsets, sizes, values: Tensor) -> None:
    """The segments of a panel, or flat buffer, rounded to its dtype; the rest stays."""
    for offset, size in zip(offsets, sizes, strict=True):
        span = slice(offset, offset + size)
        panel[..., span] = values[..., span].to(panel.dtype)


def _sizes(tensors) -> list[int]:
    return [t.numel() for t in tensors]


def _ascent_(d, q, g0, g1, offsets, state, *, p=None, p_next=None, **options):
    if len(q) == 1:  # the separation as the ops see it, rounded: so that it can be saved
        transform = reference.state_field(state, 1, "transform").clone()
        q, p = q * transform.squeeze(), None if p is None else p * transform.squeeze()
        state = state.clone()
        reference.state_field(state, 1, "transform").fill_(1.0)
    next_d, next_p, gram = reference.ascent_(q, g0, g1, offsets, state, p=p, **options)
    written = [(d, next_d)] + ([] if p_next is None else [(p_next, next_p)])
    for panel, values in written:
        _write(panel, offsets, _sizes(g0), values)
    return gram


def _benettin_(state, *arguments, **options):
    state.copy_(reference.benettin_(state, *arguments, **options))


def _benettin_refine_(state, gram, k):
    state.copy_(reference.benettin_refine_(state, gram, k))


def _recenter_(q, copies, d, theta, offsets, state, *, p=None, p_next=None, metric=None):
    next_q, _, next_p = reference.recenter_(q, d, theta, offsets, state, p=p, p_next=p_next)
    written = [(q, next_q)] + ([] if p is None else [(p, next_p)])
    for panel, values in written:
        _write(panel, offsets, _sizes(theta), values)
    # In q's dtype, as `ascent_` finds out what rounding made of it.
    times = reference.state_field(state, 1, "transform").squeeze() if len(q) == 1 else 1.0
    for here, offset in zip(theta, offsets, strict=True):
        span = slice(offset, offset + here.numel())
        spread = reference.spread(state, len(q), metric, span, q.dtype)
        there = here.flatten().to(q.dtype) + q[:, span] * times * spread
        copies[:, span] = there.to(copies.dtype)


def _reseed_(panel, offsets, sizes, state, *, elements, seed=0, p=None):
    lost = int(reference.state_field(state, len(panel), "reseed"))
    panel.copy_(reference.reseed_(panel, offsets, sizes, state, elements=elements, seed=seed))
    if lost and p is not None:
        _write(p[lost - 1], offsets, sizes, torch.zeros_like(p[0]))


def _slopes_(theta, gradient, offsets, panel, state, *, buffer=None, **options):
    call = (theta, gradient, offsets, panel, state)
    slopes, following = reference.slopes_(*call, buffer=buffer, **options)
    if buffer is not None:
        _write(buffer, offsets, _sizes(theta), following)
    return slopes


def _descend_(theta, gradient, state, *, buffer=None, offsets=None, panel=None, **options):
    moved, rates, following = reference.descend_(
        theta, gradient, state, buffer=buffer, offsets=offsets, panel=panel, **options
    )
    for t, value in zip(theta, moved, strict=True):
        t.copy_(value)
    if buffer is not None and panel is None:
        _write(buffer, offsets, _sizes(theta), following)
    return rates


def _displace_(copies, v, theta, offsets, step):
    moved, sums = reference.displace_(v, theta, offsets, step)
    for copy, value in zip(copies, moved, strict=True):
        copy.copy_(value)
    return sums


def _difference_(out, plus, minus, offsets, scale, **options):
    value = reference.difference_(out, plus, minus, offsets, scale, **options)
    _write(out, offsets, _sizes(plus), value)


def _combine_(out, panel, matrix, *, gate=None):
    out.copy_(reference.combine_(out, panel, matrix, gate=gate))


def _project_(w, v, coefficients):
    left, products = reference.project_(w, v, coefficients)
    w.copy_(left)
    return products


LIBRARY = SimpleNamespace(
    ascent_=_ascent_,
    benettin_=_benettin_,
    benettin_refine_=_benettin_refine_,
    combine_=_combine_,
    descend_=_descend_,
    difference_=_difference_,
    directional_products=reference.directional_products,
    displace_=_displace_,
    gram=reference.gram,
    project_=_project_,
    recenter_=_recenter_,
    reseed_=_reseed_,
    slopes_=_slopes_,
)


@contextmanager
def oracles() -> Iterator[None]:
    """Inside, the ops are the oracles, on the CPU."""
    with patch("lyapcuda.ops.library.namespace", LIBRARY):
        yield
