"""Ops with a diagonal metric S: separations in the coordinates where the curvature is S·H·S."""

import math

import pytest
import torch

from benettin_steps import LOSSES, SIZE, Step
from lyapcuda import ops
from op_inputs import BF16, DTYPES, F32, F64, assert_same_bits, cloned
from op_table import TABLE

pytestmark = pytest.mark.usefixtures("backend")

ASCENT, RECENTER = TABLE["ascent_"], TABLE["recenter_"]
KEPT = 0.75  # a displacement from before


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_metric_of_ones_gives_the_bits_that_none_gives(k, dtypes):
    for row, form, written in (
        (ASCENT, "plain", "d"),
        (ASCENT, "realised", "d"),
        (RECENTER, "pending", "copies"),
        (RECENTER, "not pending", "copies"),
    ):
        inputs = row.inputs([33, 1030], k, *dtypes)
        a = row.draw(inputs, **row.forms[form], displacement=1.0)
        b = cloned(a) | {"metric": torch.ones(inputs.n, dtype=inputs.buffer)}
        found, expected = row.call(b), row.call(a)
        assert_same_bits(b[written], a[written])
        if expected is not None:
            assert_same_bits(found, expected)


@pytest.mark.parametrize("k", [1, 3])
def test_where_the_metric_is_zero_the_copy_and_the_separation_stay(k):
    for dtypes in ((F32, F32), (F32, BF16)):
        inputs = ASCENT.inputs([33, 1030], k, *dtypes)
        a = ASCENT.arguments(inputs, "realised, metric")
        a["metric"][::2] = 0.0
        frozen = inputs.used & (a["metric"] == 0)
        copies = inputs.panel(dtype=inputs.storage)
        ops.state_field(a["state"], k, "pending").fill_(float(k == 1))
        where = (a["theta"], a["offsets"], a["state"])
        ops.recenter_(a["q"], copies, a["d"], *where, metric=a["metric"])
        assert ASCENT.call(a).isfinite().all()
        at_theta = torch.cat([t.flatten() for t in a["theta"]]).expand(k, -1)
        assert torch.equal(copies[:, frozen], at_theta[:, frozen[inputs.used]])
        times = float(ops.state_field(a["state"], 1, "transform")) if k == 1 else 1.0
        assert torch.equal(a["d"][:, frozen], a["q"][:, frozen] * times)


@pytest.mark.parametrize("realised", [False, True])
@pytest.mark.parametrize("k", [1, 4])
def test_the_values_are_those_of_the_preconditioned_hessian_at_the_displacement_asked_for(
    k, realised
):
    n, size = 60, 0.1
    generator = torch.Generator().manual_seed(5)
    wanted = torch.tensor([8.0, 6.0, 4.5, 3.4], dtype=F64)
    metric = 10 ** torch.linspace(-1, 1, n, dtype=F64)
    curvature = torch.cat([torch.linspace(-1, 1, n - 4, dtype=F64), wanted]) / metric**2
    metric[:3], curvature[:3] = 0.0, 9.0
    theta = torch.randn(n, generator=generator, dtype=F64)
    start = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))[0].T * size
    q, d, copies = start.contiguous(), torch.zeros(k, n, dtype=F64), torch.zeros(k, n, dtype=F64)
    state = ops.new_state("cpu", k, perturbation=size, beta=0.0)
    field = {name: ops.state_field(state, k, name) for name in ops.state_fields(k)}
    options = {"theta": [theta] if realised else None, "metric": metric}
    for step in range(25):
        ops.recenter_(q, copies, d, [theta], [0], state, metric=metric)
        if step:
            distance = (copies - theta).norm(dim=1)
            torch.testing.assert_close(distance, torch.full_like(distance, size), rtol=1e-9, atol=0)
        field["pending"].fill_(float(k == 1))
        g0, g1 = curvature * theta, curvature * copies
        gram = ops.ascent_(d, q, [g0], g1, [0], state, **options)
        displaced = ops.gram(d, d, weights=metric)
        ops.benettin_(state, gram, LOSSES, k, realised=realised, displaced=displaced)
        if k > 1:
            ops.combine_(d, d, field["transform"], gate=field["again"])
            ops.benettin_refine_(state, ops.gram(d, d, gate=field["again"]), k)
        else:
            q, d = d, q
    torch.testing.assert_close(field["rayleigh"], wanted[:k], rtol=1e-3, atol=0)
    assert float(field["steps"]) == 25


# --- the displacement ----------------------------------------------------------------------------


def displaced_by(step, metric):
    rows = step.d * metric
    return rows @ rows.T


@pytest.mark.parametrize("k", [1, 4])
def test_the_displacement_takes_the_next_copies_to_their_distance(k):
    step = Step(k, displacement=KEPT)
    metric = torch.linspace(0, 3, step.d.shape[1], dtype=F64)
    step.run(displaced=displaced_by(step, metric))
    moved = step["displacement"][:, None] * metric * (step["transform"].T @ step.d)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((k,), SIZE, dtype=F64))


def test_the_displacement_stays_where_nothing_says_otherwise():
    good = torch.eye(3, dtype=F64)
    met = {"curvature": torch.full((200,), -1 / 0.17, dtype=F64)}
    for what, drawn, losses, displaced in (
        ("none is given", {}, LOSSES, None),
        ("refused", {}, torch.tensor([math.nan], dtype=F64), good),
        ("the copies met", met, LOSSES, good),
        ("zero", {}, LOSSES, torch.zeros(3, 3, dtype=F64)),
        ("negative", {}, LOSSES, -good),
        ("not a number", {}, LOSSES, good * math.nan),
        ("infinite", {}, LOSSES, good * math.inf),
    ):
        step = Step(3, displacement=KEPT, **drawn).run(losses, displaced=displaced)
        assert (step["displacement"] == KEPT).all(), what
