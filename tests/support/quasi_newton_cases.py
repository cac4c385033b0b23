"""Inputs for the tests of the steps with k curvatures, and the steps held against their oracles."""

from __future__ import annotations

import torch

from lyapcuda import ops
from lyapcuda.ops import panel_reference
from ops_cases import F32, F64, assert_same_bits, surroundings
from panel_cases import make_panel_case

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


def check_slopes(case, kind, exact=False, **options):
    """Holds panel_slopes_ against its oracle; returns the slopes."""
    options = step_options(case, kind, **options)
    expected, expected_p = panel_reference.panel_slopes_(*step_arguments(case), **options)
    untouched = [*case.theta, *case.g0, case.d, case.q, case.state]
    before = [t.clone() for t in untouched]
    around, held = surroundings(case.p), case.p.clone()
    slopes = ops.panel_slopes_(*step_arguments(case), **options)
    assert slopes.shape == (case.k,) and slopes.dtype == F64
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)
    assert torch.equal(surroundings(case.p), around)
    assert_same_bits(case.p[1:], held[1:])
    assert_same_bits(case.p[0][~case.used()], held[0][~case.used()])
    if kind:
        size = expected_p.abs() + 3.0
        error = (case.p[0].double() - expected_p).abs()
        assert (error <= (0 if exact else 4 * torch.finfo(case.p.dtype).eps * size)).all()
    if exact:
        assert_same_bits(slopes, expected)
    else:
        # u is rounded to the buffers' dtype; then the sums are those of doubles.
        size = case.d.double().abs().where(case.used(), torch.zeros(())).sum(1) * 6.0
        assert ((slopes - expected).abs() <= 4 * torch.finfo(case.d.dtype).eps * size).all()
    return slopes


def rates_and_weights(case, slopes, gain, max_lr):
    """As csrc/newton.h has them; the weights by the oracle's float64."""
    field = {
        name: ops.panel_field(case.state, case.k, name)
        for name in ("h_ema", "residual", "transform", "perturbation")
    }
    rest = field["h_ema"].abs()[-1] + field["residual"][-1]
    curvatures = torch.cat([torch.maximum(field["h_ema"].abs(), rest), rest[None]])
    rates = torch.where(curvatures * max_lr > 1, gain / curvatures, gain * max_lr)
    along = (rates[:-1] - rates[-1]) * (field["transform"].T @ slopes)
    return rates, field["transform"] @ (along / field["perturbation"] ** 2)


def stepped_bits(case, weights, rate, options):
    """θ after the step in the buffers' arithmetic, each operation rounded once."""
    dtype = case.d.dtype

    def number(value):
        return torch.tensor(float(value), dtype=dtype)

    out = []
    for t, g, offset in zip(case.theta, case.g0, case.offsets, strict=True):
        span = slice(offset, offset + t.numel())
        theta = t.flatten().to(dtype)
        u = g.flatten().to(dtype) + theta * number(options["weight_decay"])
        if "buffer" in options:
            held = options["buffer"][span]
            u = u + held * number(options["momentum"]) if options.get("nesterov") else held
        theta = theta - u * number(rate)
        for weight, row in zip(weights, case.d[:, span], strict=True):
            theta = theta - row * number(weight)
        out.append(theta.to(t.dtype).view(t.shape))
    return out


def check_descend(case, kind, gain=0.7, max_lr=10.0, **more):
    """Holds panel_descend_ against its oracle and its own arithmetic."""
    options = step_options(case, kind)
    generator = torch.Generator().manual_seed(case.k)
    slopes = torch.randn(case.k, generator=generator, dtype=F64)
    moved, expected_rates = panel_reference.panel_descend_(
        *step_arguments(case), slopes, gain=gain, max_lr=max_lr, **options, **more
    )
    rates, weights = rates_and_weights(case, slopes, gain, max_lr)
    expected = stepped_bits(case, weights, rates[-1], options)
    untouched = [*case.g0, case.d, case.p, case.q, case.state]
    before = [t.clone() for t in untouched]
    around = [surroundings(t) for t in case.theta]
    sizes = [t.double().abs() for t in case.theta]
    used = ops.panel_descend_(
        *step_arguments(case), slopes, gain=gain, max_lr=max_lr, **options, **more
    )
    torch.testing.assert_close(used, expected_rates, rtol=1e-15, atol=0)
    torch.testing.assert_close(used, rates, rtol=1e-15, atol=0)
    for now, then in zip(untouched, before, strict=True):
        assert_same_bits(now, then)
    assert all(map(torch.equal, map(surroundings, case.theta), around))
    epsilon = torch.finfo(case.d.dtype).eps
    for t, bits, oracle, size, offset in zip(
        case.theta, expected, moved, sizes, case.offsets, strict=True
    ):
        rows = case.d[:, offset : offset + t.numel()].double().abs()
        size = size * 2 + 4.0 + (weights.abs() @ rows).view(t.shape)
        error = (t.double() - oracle).abs()
        assert (error <= ((case.k + 8) * epsilon + torch.finfo(t.dtype).eps) * size).all()
        # A weight's sum in another order may round the other way: then an element may, too.
        near = 2 * torch.finfo(t.dtype).eps * size + 4 * epsilon * size
        assert ((t.double() - bits.double()).abs() <= near).all()
