"""The fakes of the compiled ops: the shapes that they return, for tracing."""

from __future__ import annotations

import torch

__all__ = ["register_fakes"]


def _writes_only(*args, **options):
    return None


def _panel_sums(d, q, g0, g1, offsets, state, *, theta=None, p=None, **options):
    rows = (2 + (theta is not None) + (p is not None)) * q.shape[0]
    return state.new_empty(rows, rows)


#: What each op returns, by shapes alone.
_FAKES = {
    "ascent_": lambda d, q, g0, g1, offsets, state, **options: state.new_empty(6),  # SUM_FIELDS
    "descend_": lambda theta, gradient, state, **options: state.new_empty(()),
    "displace_": lambda copies, v, theta, offsets, step: step.new_empty(2),
    "gram": lambda a, b, **options: a.new_empty(a.shape[0], b.shape[0], dtype=torch.float64),
    "panel_ascent_": _panel_sums,
    "panel_descend_": lambda theta, gradient, offsets, panel, state, slopes, **options: (
        state.new_empty(panel.shape[0] + 1)
    ),
    "panel_slopes_": lambda theta, gradient, offsets, panel, state, **options: state.new_empty(
        panel.shape[0]
    ),
    "project_": lambda w, v, coefficients: coefficients.new_empty(v.shape[0] + 1),
}
_RETURN_NOTHING = (
    "benettin_",
    "benettin_refine_",
    "combine_",
    "difference_",
    "exponent_",
    "panel_recenter_",
    "recenter_",
    "reseed_",
    "secant_",
    "stream_copy_",
)


def register_fakes(namespace: str) -> None:
    """Registers the fake of every op that ``torch.ops.<namespace>`` has, for tracing."""
    for name, fake in {**dict.fromkeys(_RETURN_NOTHING, _writes_only), **_FAKES}.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", fake)
