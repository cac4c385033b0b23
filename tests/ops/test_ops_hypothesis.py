"""Every op of torch.ops.lyapcuda at shapes, types, offsets and alignments of hypothesis's choice,
against its float64 oracle.

Inputs are small whole numbers and powers of two, so that each product and sum is exact and a result
must be the oracle's to the last bit. LYAPCUDA_EXAMPLES sets how many examples an op gets
(bench/robustness.py: more than here).
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from benettin_steps import check as check_benettin
from benettin_steps import random_step
from drawn_cases import Drawn, Untouched, drawn, same
from lyapcuda import ops
from lyapcuda.ops import panel_reference, reference
from ops_cases import F64, ascent_options, assert_same_bits, make_case
from panel_cases import panel_ascent_options
from quasi_newton_cases import KINDS, check_descend, check_slopes, newton_case

EXAMPLES = int(os.environ.get("LYAPCUDA_EXAMPLES", "40"))


def exact_state(state: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(state, expected, rtol=1e-13, atol=0, equal_nan=True)


# --- one check an op -----------------------------------------------------------------------------


def ascent_(d: Drawn) -> None:
    case = d.case()
    realised, heavy, in_place = d.flags
    options = ascent_options(case, realised=realised, heavy=heavy) | {"sign": d.sign}
    known = {name: value for name, value in options.items() if name != "p_next"}
    exact_d, exact_p, exact_sums = reference.ascent_(
        case.q, case.g0, case.g1, case.offsets, case.state, **known
    )
    out = case.q if in_place else case.d
    untouched, gaps = Untouched(case), case.gaps()
    outside = out[gaps].clone()
    sums = ops.ascent_(out, case.q, case.g0, case.g1, case.offsets, case.state, **options)
    same(out, exact_d)
    same(sums, exact_sums)
    assert_same_bits(out[gaps], outside)
    if heavy:
        same(case.p_next, exact_p)
    untouched.check(out, *([case.p_next] if heavy else []))


def recenter_(d: Drawn) -> None:
    case = d.case(committed=float(d.flags[0]))
    beside = {"p": case.d, "p_previous": case.p_next} if d.flags[0] else {}
    rest = (case.p, case.theta, case.offsets, case.state)
    exact_theta1, exact_q, exact_p = reference.recenter_(case.q, *rest, **beside)
    untouched = Untouched(case)
    ops.recenter_(case.theta1, case.q, *rest, **beside)
    for mine, exact in zip(case.theta1, exact_theta1, strict=True):
        same(mine, exact)
    assert_same_bits(case.q, exact_q)
    if beside:
        assert_same_bits(case.d, exact_p)
    untouched.check(case.q, *case.theta1, *([case.d] if beside else []))


def descend_(d: Drawn) -> None:
    case = d.case(h_ema=2.0 * d.sign, accepted=float(d.flags[0] or d.flags[1]))
    options = dict(gain=1.0, max_lr=0.25 if d.flags[2] else 8.0, weight_decay=0.5 * d.flags[1])
    exact_theta, exact_lr, *_ = reference.descend_(case.theta, case.g0, case.state, **options)
    untouched = Untouched(case)
    lr = ops.descend_(case.theta, case.g0, case.state, **options)
    for mine, exact in zip(case.theta, exact_theta, strict=True):
        same(mine, exact)
    same(lr, exact_lr)
    untouched.check(*case.theta)


def displace_(d: Drawn) -> None:
    case = d.case()
    step = torch.tensor([0.25 * d.sign], dtype=F64)
    copies, sums = reference.displace_(case.q, case.theta, case.offsets, step)
    untouched = Untouched(case)
    same(ops.displace_(case.theta1, case.q, case.theta, case.offsets, step), sums)
    for mine, exact in zip(case.theta1, copies, strict=True):
        same(mine, exact)
    untouched.check(*case.theta1)


def difference_(d: Drawn) -> None:
    case = d.case()
    scale = torch.tensor([0.5 * d.sign], dtype=F64)
    options = dict(keep=0.5 * d.flags[0], weight_decay=0.25 * d.flags[1])
    options["v"] = case.q if d.flags[1] else None
    arguments = (case.d, case.g1, case.g0, case.offsets, scale)
    exact = reference.difference_(*arguments, **options)
    untouched = Untouched(case)
    ops.difference_(*arguments, **options)
    same(case.d, exact)
    untouched.check(case.d)


def stream_copy_(d: Drawn) -> None:
    case = d.case()
    exact, untouched = reference.stream_copy_(case.q), Untouched(case)
    ops.stream_copy_(case.d, case.q)
    assert_same_bits(case.d, exact)
    untouched.check(case.d)


def numbers(d: Drawn) -> torch.Tensor:
    """Sums that could be real ones, with zero, NaN or infinity among them where flagged."""
    generator = torch.Generator().manual_seed(d.seed)
    qq, dd = torch.rand(2, generator=generator, dtype=F64) + 0.5
    yy, cosine = 4 * torch.rand(2, generator=generator, dtype=F64) - 2
    known = {"dd": dd, "qq": qq, "qy": cosine * qq, "yy": yy.abs() + cosine**2 * qq}
    known |= {"carried_q": qq, "carried_y": cosine * qq}
    sums = torch.stack([known[name] for name in ops.SUM_FIELDS])
    if d.flags[2]:
        at = int(torch.randint(0, len(sums), (), generator=generator))
        sums[at] = (0.0, float("nan"), float("inf"))[d.variant % 3]
    return sums


def exponent_(d: Drawn) -> None:
    state, sums = make_case([], beta=0.25).state, numbers(d)
    losses = torch.tensor([0.5, float("inf") if d.variant == 9 else 0.25], dtype=F64)
    options = dict(sign=d.sign, estimate=d.k % 4, momentum=0.5 * (d.variant % 2), ema=0.5)
    options |= dict(control=d.flags[0], alternate=d.flags[1])
    exact = reference.exponent_(state, sums, losses, **options)
    ops.exponent_(state, sums, losses, **options)
    torch.testing.assert_close(state, exact, rtol=1e-9, atol=1e-12, equal_nan=True)


def secant_(d: Drawn) -> None:
    state, sums = make_case([]).state, numbers(d)
    exact = reference.secant_(state, sums, sign=d.sign)
    ops.secant_(state, sums, sign=d.sign)
    torch.testing.assert_close(state, exact, rtol=1e-9, atol=1e-12, equal_nan=True)


def panel_ascent_(d: Drawn) -> None:
    case = d.panels()
    realised, heavy, _ = d.flags
    options = panel_ascent_options(case, realised=realised, heavy=heavy) | {"sign": d.sign}
    known = {name: value for name, value in options.items() if name != "p_next"}
    rest = (case.q, case.g0, case.g1, case.offsets, case.state)
    exact_d, exact_p, exact_gram = panel_reference.panel_ascent_(*rest, **known)
    untouched, used = Untouched(case), case.used()
    outside = case.d[:, ~used].clone()
    same(ops.panel_ascent_(case.d, *rest, **options), exact_gram)
    same(case.d, exact_d)
    assert_same_bits(case.d[:, ~used], outside)
    if heavy:
        same(case.p_next, exact_p)
    untouched.check(case.d, *([case.p_next] if heavy else []))


def panel_recenter_(d: Drawn) -> None:
    case = d.panels(pending=float(d.flags[0]))
    rest = (case.d, case.theta, case.offsets, case.state)
    exact_q, exact_copies = panel_reference.panel_recenter_(case.q, *rest)
    untouched = Untouched(case)
    ops.panel_recenter_(case.q, case.copies, *rest)
    same(case.q, exact_q)
    same(case.copies, exact_copies)
    untouched.check(case.q, case.copies)


def benettin_(d: Drawn) -> None:
    options = dict(control=d.flags[0], alternate=d.flags[1], rotate=d.flags[2], ema=0.5)
    check_benettin(random_step(random.Random(d.seed), d.k), estimate=d.variant % 4, **options)


def benettin_refine_(d: Drawn) -> None:
    generator = torch.Generator().manual_seed(d.seed)
    state = ops.new_panel_state("cpu", d.k, perturbation=0.5, again=float(not d.flags[0]))
    for name in ("r", "transform"):
        field = ops.panel_field(state, d.k, name)
        field.copy_(
            torch.randn(d.k, d.k, generator=generator, dtype=F64).triu() + 2 * torch.eye(d.k)
        )
    ops.panel_field(state, d.k, "exponent").fill_(0.5)
    # Nearly orthonormal rows of norm Δq, as the first pass leaves them; or a pair of equal ones.
    rows = (
        torch.eye(d.k, dtype=F64)
        + 0.05 * torch.randn(d.k, d.k, generator=generator, dtype=F64) / d.k
    )
    if d.flags[1] and d.k > 1:
        rows[1] = rows[0]
    gram = 0.25 * rows @ rows.T
    if d.variant == 9:
        gram[0, 0] = float("nan")
    exact = panel_reference.benettin_refine_(state, gram, d.k)
    ops.benettin_refine_(state, gram, d.k)
    torch.testing.assert_close(state, exact, rtol=1e-9, atol=1e-9, equal_nan=True)


def reseed_(d: Drawn) -> None:
    panels = d.flags[0]
    row = d.variant % d.k + 1 if panels else 1
    case = (d.panels if panels else d.case)(reseed=0.0 if d.flags[1] else float(row))
    sizes = [g.numel() for g in case.g0]
    options = dict(elements=max(sum(sizes), 1), seed=d.seed)
    where = (case.offsets, sizes, case.state)
    exact = reference.reseed_(case.q, *where, **options)
    untouched = Untouched(case)
    ops.reseed_(case.q, *where, p=case.p if d.flags[2] else None, **options)
    assert_same_bits(case.q, exact)
    untouched.check(case.q, *([case.p] if d.flags[2] else []))


def newton(d: Drawn):
    options = dict(exact=True, gap=d.gap, shift=d.shift, seed=d.seed)
    return newton_case(d.k, d.sizes, d.dtypes[1], **options)


def panel_slopes_(d: Drawn) -> None:
    check_slopes(newton(d), KINDS[d.variant % 3])


def panel_descend_(d: Drawn) -> None:
    check_descend(newton(d), KINDS[d.variant % 3], max_lr=10.0 if d.flags[0] else 0.01)


def gate(d: Drawn) -> torch.Tensor | None:
    return None if d.flags[0] else torch.full((1,), float(d.flags[1]), dtype=F64)


def gram(d: Drawn) -> None:
    case = d.panels()
    untouched = Untouched(case)
    rows = case.q[: d.k // 2 + 1]
    same(ops.gram(rows, case.d, gate=gate(d)), panel_reference.gram(rows, case.d, gate=gate(d)))
    untouched.check()


def combine_(d: Drawn) -> None:
    case = d.panels()
    columns = d.k // 2 + 1
    matrix = torch.randint(-2, 3, (d.k, columns), generator=torch.Generator().manual_seed(d.seed))
    out, matrix = case.d[:columns], matrix.double() / 2
    exact = panel_reference.combine_(out, case.q, matrix, gate=gate(d))
    rest = case.d[columns:].clone()
    ops.combine_(out, case.q, matrix, gate=gate(d))
    same(out, exact)
    assert_same_bits(case.d[columns:], rest)


def project_(d: Drawn) -> None:
    case = d.panels()
    c = torch.randint(-2, 3, (d.k,), generator=torch.Generator().manual_seed(d.seed)).double() / 2
    w = case.d[0]
    exact_w, exact = panel_reference.project_(w, case.q, c)
    rest = case.d[1:].clone()
    same(ops.project_(w, case.q, c), exact)
    same(w, exact_w)
    assert_same_bits(case.d[1:], rest)


CHECKS = [
    *(ascent_, exponent_, secant_, recenter_, descend_, displace_, difference_),
    *(stream_copy_, panel_ascent_, benettin_, benettin_refine_, panel_recenter_, gram, combine_),
    *(project_, reseed_, panel_slopes_, panel_descend_),
]


def test_no_op_is_missing():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lyapcuda::")
    }
    assert {check.__name__ for check in CHECKS} == registered


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_anything_is_the_oracles(check):
    count = 0

    @given(drawn())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize="LYAPCUDA_EXAMPLES" not in os.environ,
    )
    def run(example):
        nonlocal count
        count += 1
        check(example)

    run()
    assert count >= min(EXAMPLES, 20)
