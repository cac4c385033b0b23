"""reseed_: another separation where one was lost, the same bits on every backend."""

import math
from types import SimpleNamespace

import pytest
import torch

from lyapcuda import ops
from lyapcuda.params.flat import FlatLayout
from op_inputs import F32, F64, SEGMENTS, Inputs, assert_same_bits, cloned, tensors_of

pytestmark = pytest.mark.usefixtures("backend")


def reseeded(n, k=1, seed=0, **state):
    """The row that was made, of n elements."""
    inputs = Inputs([n], k, F64, F64)
    panel, state = inputs.panel(), inputs.state(**{"reseed": 1.0, **state})
    ops.reseed_(panel, inputs.offsets, [n], state, elements=n, seed=seed)
    return panel[0, inputs.used]


@pytest.mark.parametrize("asked", [0.0, -1.0, 4.0, math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 3])
def test_where_nothing_is_lost_nothing_is_written(k, asked):
    inputs = Inputs(SEGMENTS, k)
    a = {"panel": inputs.panel(), "p": inputs.panel(), "state": inputs.state(reseed=asked)}
    before = cloned(a)
    ops.reseed_(a["panel"], inputs.offsets, inputs.counts, a["state"], elements=10, p=a["p"])
    ops.reseed_(a["panel"], [], [], inputs.state(reseed=1.0), elements=10)
    for now, then in zip(tensors_of(a), tensors_of(before), strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("transform", [1.0, -1e-4, 30.0, 0.0, math.nan])
def test_its_norm_is_about_the_perturbation(transform):
    for n in (1, 2, 10007):
        norm = float(reseeded(n, transform=transform, perturbation=0.01).norm())
        norm *= abs(transform) if transform and math.isfinite(transform) else 1.0
        # Every element is within [1/2, 1)/sqrt(7/12) of the mean.
        assert 0.65 < norm / 0.01 < 1.31
        if n > 1000:
            assert norm == pytest.approx(0.01, rel=0.02)


def test_every_call_seed_and_place_gives_another_direction():
    n = 20000
    fields = ({}, 0), ({"steps": 13.0}, 0), ({"skipped": 5.0}, 0), ({}, 1)
    panel = torch.stack([reseeded(n, seed=seed, **state) for state, seed in fields])
    panel = panel / panel.norm(dim=1, keepdim=True)
    cosines = panel @ panel.T - torch.eye(4, dtype=F64)
    assert float(cosines.abs().max()) < 5 / math.sqrt(n)
    first = panel[0]
    assert abs(float(first.mean())) < 5 / n  # the signs are even
    assert abs(float((first[1:] * first[:-1]).sum())) < 5 / math.sqrt(n)
    assert len(first.unique()) == n


def test_every_group_and_shard_has_a_seed_of_its_own():
    parameters = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (F32, F64)]
    layout, seen = FlatLayout(parameters), []
    for shard in (None, 0, 1, 7):
        layout.ranks = None if shard is None else SimpleNamespace(shard=shard)
        for seed in (0, 2**63 - 1):
            seen.append(layout.seeds(seed))
    assert seen[:2] == seen[2:4] == [[0, 1], [2**63 - 1, 0]]
    rest = sum(seen[2:], [])
    assert len(set(rest)) == len(rest) - 3 and all(0 <= seed < 2**63 for seed in rest)
