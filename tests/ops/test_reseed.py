"""reseed_: another separation where one was lost, the same bits on every backend."""

import math
from types import SimpleNamespace

import pytest
import torch

import simt_library
from lyapcuda import ops
from lyapcuda.ops import reference
from lyapcuda.params.flat import FlatLayout
from ops_cases import F32, F64, assert_same_bits, make_case, state_with, threads
from panel_cases import make_panel_case

SIZES = [9, 0, (), (3, 0, 2), 5001, (33, 7), 1]


def sizes_of(case):
    return [t.numel() for t in case.theta]


def flat_case(dtype, sizes=SIZES, **fields):
    case = make_case(sizes, dtype, dtype, shift=1, gap=5)
    state = state_with(case.state, **{"steps": 12.0, "skipped": 3.0, "reseed": 1.0, **fields})
    return case, state


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -1])
def test_a_flat_buffer_to_the_bit(dtype, seed):
    # One of them with more segments than a launch takes.
    sizes = [k % 5 for k in range(simt_library.SEGMENTS * 3 // 2)] if seed == 7 else SIZES
    case, state = flat_case(dtype, sizes, scale=-0.3)
    sizes, elements = sizes_of(case), sum(sizes_of(case)) + 100  # (another group has 100)
    where = (case.offsets, sizes, state)
    expected = reference.reseed_(case.q, *where, elements=elements, seed=seed)
    p, before = case.p.clone(), state.clone()
    ops.reseed_(case.q, *where, elements=elements, seed=seed, p=case.p)
    assert_same_bits(case.q, expected)  # the gaps too: they stay
    gaps = case.gaps()
    assert (case.p[~gaps] == 0).all() and torch.equal(case.p[gaps], p[gaps])
    assert_same_bits(state, before)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("k", [1, 3, 32])
def test_a_row_of_a_panel_to_the_bit(dtype, k):
    for row in {0, k // 2, k - 1}:
        case = make_panel_case(k, SIZES, dtype, dtype, gap=5)
        for name, value in (("reseed", row + 1.0), ("steps", 5.0), ("skipped", 2.0)):
            ops.panel_field(case.state, k, name).fill_(value)
        where = (case.offsets, sizes_of(case), case.state)
        expected = reference.reseed_(case.q, *where, elements=6000, seed=3)
        q, p = case.q.clone(), case.p.clone()
        ops.reseed_(case.q, *where, elements=6000, seed=3, p=case.p)
        assert_same_bits(case.q, expected)
        others = [i for i in range(k) if i != row]
        assert_same_bits(case.q[others], q[others])
        assert_same_bits(case.p[others], p[others])
        inside = case.q[row] != q[row]
        assert int(inside.sum()) == sum(sizes_of(case)) and (case.p[row][inside] == 0).all()


@pytest.mark.parametrize("asked", [0.0, -1.0, 2.0, math.nan, math.inf])
def test_where_nothing_is_lost_nothing_is_written(asked):
    case, state = flat_case(F32, reseed=asked)
    q, p = case.q.clone(), case.p.clone()
    ops.reseed_(case.q, case.offsets, sizes_of(case), state, elements=10, p=case.p)
    assert_same_bits(case.q, q)
    assert_same_bits(case.p, p)
    ops.reseed_(case.q, [], [], state_with(state, reseed=1.0), elements=10)
    assert_same_bits(case.q, q)


@pytest.mark.parametrize("scale", [1.0, -1e-4, 30.0, 0.0, math.nan])
def test_its_norm_is_about_the_perturbation(scale):
    for n in (1, 2, 10007):
        case, state = flat_case(F64, sizes=[n], scale=scale, perturbation=0.01)
        ops.reseed_(case.q, case.offsets, [n], state, elements=n)
        start = case.offsets[0]
        norm = float(case.q[start : start + n].norm())
        norm *= abs(scale) if scale and math.isfinite(scale) else 1.0
        # Every element is within [1/2, 1)/sqrt(7/12) of the mean.
        assert 0.65 < norm / 0.01 < 1.31
        if n > 1000:
            assert norm == pytest.approx(0.01, rel=0.02)


def test_every_call_seed_and_place_gives_another_direction():
    n = 20000
    seen = []
    for fields, seed in (({}, 0), ({"steps": 13.0}, 0), ({"skipped": 5.0}, 0), ({}, 1)):
        case, state = flat_case(F64, sizes=[n], **fields)
        ops.reseed_(case.q, case.offsets, [n], state, elements=n, seed=seed)
        seen.append(case.q[case.offsets[0] : case.offsets[0] + n].clone())
    panel = torch.stack(seen)
    panel = panel / panel.norm(dim=1, keepdim=True)
    cosines = panel @ panel.T - torch.eye(4, dtype=F64)
    assert float(cosines.abs().max()) < 5 / math.sqrt(n)
    first = panel[0]
    assert abs(float(first.mean())) < 5 / n  # the signs are even
    assert abs(float((first[1:] * first[:-1]).sum())) < 5 / math.sqrt(n)
    assert len(first.unique()) == n


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 4):
        case, state = flat_case(F32, sizes=[200003, 5])
        with threads(count):
            ops.reseed_(case.q, case.offsets, sizes_of(case), state, elements=200008)
        results.append(case.q)
    assert_same_bits(*results)


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


def test_the_version_of_what_is_written_counts():
    case, state = flat_case(F32)
    q, p, read = case.q._version, case.p._version, state._version
    ops.reseed_(case.q, case.offsets, sizes_of(case), state, elements=3, p=case.p)
    assert case.q._version > q and case.p._version > p and state._version == read


WRONG = {
    "panel dtype": ({"panel": torch.zeros(50, dtype=torch.float16)}, "panel: expected float32 or"),
    "panel dim": (
        {"panel": torch.zeros(2, 3, 4)},
        "panel: expected a contiguous 2-D tensor",
    ),
    "state size": ({"state": torch.zeros(3, dtype=F64)}, "state: expected 18 elements, got 3"),
    "state dtype": ({"state": torch.zeros(18)}, "state: expected a contiguous float64"),
    "p size": ({"p": torch.zeros(3)}, "p: 3 elements, but panel has"),
    "p dtype": ({"p": torch.zeros(50, dtype=F64)}, "p: dtype Double differs from panel's Float"),
    "elements": ({"elements": 0}, "elements: expected at least 1, got 0"),
    "counts": ({"sizes": [1]}, "sizes: 1 entries, but offsets has 2"),
    "beyond": ({"sizes": [5, 46]}, "offsets.1.: 5 . 46 elements don't fit a buffer of 50"),
    "within": ({"offsets": [0, 4]}, "offsets.1.: 4 . 5 elements.*or lie in the segment before"),
    "negative": ({"sizes": [-1, 5]}, "offsets.0."),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    state = ops.new_state("cpu", perturbation=0.1, scale=1.0, reseed=1.0)
    arguments = {"panel": torch.ones(50), "offsets": [0, 5], "sizes": [5, 5], "state": state}
    arguments |= {"elements": 10, "p": None} | replaced
    before = arguments["panel"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.reseed_(**arguments)
    assert torch.equal(arguments["panel"], before)


def test_p_may_not_share_memory_with_the_panel():
    panel = torch.ones(50)
    state = ops.new_state("cpu", perturbation=0.1, scale=1.0, reseed=1.0)
    with pytest.raises(RuntimeError, match="p: shares memory with panel"):
        ops.reseed_(panel, [0], [5], state, elements=5, p=panel)
