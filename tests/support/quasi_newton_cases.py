"""Inputs for the tests of the steps with k curvatures."""

from __future__ import annotations

import torch

from lyapcuda import ops
from ops_support import F32, F64
from panel_support import make_panel_case

#: Without momentum, heavy-ball, Nesterov's.
KINDS = [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}]


def newton_case(k, sizes, storage=F32, **options):
    """A panel case whose state has curvatures; they fall, and the last is negative."""
    h = torch.linspace(8.0, -0.5, k, dtype=F64) if k > 1 else torch.tensor([4.0], dtype=F64)
    values = {"h_ema": h, "residual": 0.25, "accepted": 1.0, "pending": 1.0}
    buffer = F64 if storage == F64 else F32
    return make_panel_case(k, sizes, buffer, storage, **{**values, **options})


def step_arguments(case):
    return (case.theta, case.g0, case.offsets, case.d, case.state)


def step_options(case, kind, **options):
    """With the buffer where there is momentum: the first row of p."""
    return {"weight_decay": 0.5, **kind, **({"buffer": case.p[0]} if kind else {}), **options}


def set_field(case, name, value):
    ops.panel_field(case.state, case.k, name).fill_(value)
