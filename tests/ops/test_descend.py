"""descend_ against its fp64 oracle, and the learning rates it chooses."""

import itertools
import math

import pytest
import torch

from lyapcuda import ops
from lyapcuda.ops import reference
from ops_cases import (
    BF16,
    F32,
    F64,
    LARGE,
    STORAGE,
    TAILS,
    assert_same_bits,
    eps,
    make_case,
    state_with,
    surroundings,
    threads,
)
from quasi_newton_cases import KINDS


def case_of(sizes, storage, **options):
    return make_case(sizes, F64 if storage == F64 else F32, storage, **options)


def check(case, exact, **options):
    if "momentum" in options:
        options |= {"buffer": case.p, "offsets": case.offsets}
    expected, expected_lr, expected_p = reference.descend_(
        case.theta, case.g0, case.state, **options
    )
    sizes = [t.double().abs() for t in case.theta]
    around = [surroundings(t) for t in [*case.theta, case.p]]
    untouched = [*case.g0, case.state, case.p[case.gaps()]]
    before, held = [t.clone() for t in untouched], case.p.double().abs()
    lr = ops.descend_(case.theta, case.g0, case.state, **options)
    assert lr.dtype == F64 and lr.shape == ()
    assert float(lr) == float(expected_lr)
    decay = options.get("weight_decay", 0.0)
    parts = zip(case.theta, expected, sizes, case.g0, case.offsets, strict=True)
    for actual, wanted, size, g, offset in parts:
        if exact:
            assert_same_bits(actual, wanted.to(actual.dtype))
            continue
        # At most a dozen roundings in the arithmetic's dtype, half an epsilon each, one to storage.
        part = held[offset : offset + actual.numel()].view(actual.shape)
        u = 2 * (g.double().abs() + decay * size) + part
        unit = 6 * eps(F64 if actual.dtype == F64 else F32) + 0.5 * eps(actual.dtype)
        size = size + abs(float(lr)) * u
        error = (actual.double() - wanted).abs()
        assert (error <= unit * (size + torch.finfo(actual.dtype).smallest_normal)).all()
    if "momentum" in options:
        error = (case.p.double() - expected_p).abs()
        assert (error == 0).all() if exact else (error <= 8 * eps(case.p.dtype) * (held + 2)).all()
    assert all(map(torch.equal, map(surroundings, [*case.theta, case.p]), around))
    for now, then in zip([*case.g0, case.state, case.p[case.gaps()]], before, strict=True):
        assert_same_bits(now, then)


@pytest.mark.parametrize("size", [*TAILS, LARGE])
@pytest.mark.parametrize("storage", STORAGE)
def test_every_size_exactly(storage, size):
    for kind in KINDS[: 1 if size == LARGE else 3]:
        case = case_of([size], storage, exact=True, shift=size % 3)
        check(case, exact=True, weight_decay=0.5, **kind)


@pytest.mark.parametrize("storage", STORAGE)
def test_segments_of_every_kind(storage):
    sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1]
    for shift, exact, kind in itertools.product((0, 1, 3), (False, True), KINDS):
        check(case_of(sizes, storage, exact=exact, shift=shift), exact, weight_decay=0.5, **kind)


@pytest.mark.parametrize("weight_decay", [0.0, 0.0123])
@pytest.mark.parametrize("gain", [0.01, 1.0, 1.9])
@pytest.mark.parametrize("storage", STORAGE)
def test_random_values_to_a_few_roundings(storage, gain, weight_decay):
    for kind in KINDS:
        case = case_of([31, 100003, (5, 7)], storage, shift=1)
        check(case, exact=False, gain=gain, weight_decay=weight_decay, **kind)


@pytest.mark.parametrize(
    ("h_ema", "accepted", "lr"),
    [
        (4.0, 1.0, 0.125),
        (0.5, 1.0, 1.0),
        (0.1, 1.0, 1.0),  # 1/h = 10, more than max_lr
        (0.0, 1.0, 1.0),
        (-3.0, 1.0, 1.0),
        (1e-320, 1.0, 1.0),
        (1e308, 1.0, 0.5 / 1e308),
        (4.0, 0.0, 0.0),  # the last step was not finite
        (math.nan, 1.0, 0.0),  # nothing measured yet
        (math.inf, 1.0, 0.0),
    ],
)
def test_the_rate_is_gain_over_h_within_bounds(h_ema, accepted, lr):
    case = make_case([100])
    before = case.theta[0].clone()
    case.state = state_with(case.state, h_ema=h_ema, accepted=accepted)
    used = ops.descend_(case.theta, case.g0, case.state, gain=0.5, max_lr=2.0)
    expected, expected_lr, _ = reference.descend_(
        [before], case.g0, case.state, gain=0.5, max_lr=2.0
    )
    assert float(used) == lr == float(expected_lr)
    torch.testing.assert_close(case.theta[0], expected[0].float(), rtol=4 * eps(F32), atol=1e-6)
    if lr == 0.0:
        assert_same_bits(case.theta[0], before)


def test_theta_stays_where_the_step_is_not_accepted_whatever_the_gradient():
    case = make_case([100], accepted=0.0)
    before = case.theta[0].clone()
    case.g0[0].fill_(math.nan)
    assert float(ops.descend_(case.theta, case.g0, case.state)) == 0.0
    assert_same_bits(case.theta[0], before)


@pytest.mark.parametrize("factor", [0.0, 0.25, math.nan, math.inf])
def test_a_factor_multiplies_the_rate_or_says_that_there_is_no_step(factor):
    case = make_case([100], exact=True)
    before = case.clone()
    options = {"momentum": 0.5, "offsets": case.offsets}
    lr = ops.descend_(
        case.theta, case.g0, case.state, factor=torch.tensor([factor], dtype=F64),
        buffer=case.p, **options,
    )  # fmt: skip
    if math.isfinite(factor):
        other = ops.descend_(
            before.theta, before.g0, before.state, gain=factor, buffer=before.p, **options
        )
        assert_same_bits(lr, other)
    else:
        assert float(lr) == 0.0
    assert_same_bits(case.theta[0], before.theta[0])
    assert_same_bits(case.p, before.p)


def test_no_parameters_still_give_the_rate():
    case = make_case([])
    assert float(ops.descend_([], [], case.state)) == 1 / 3.7


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = make_case([70001, 16385], F32, BF16)
        with threads(count):
            ops.descend_(case.theta, case.g0, case.state, weight_decay=0.1)
        results.append(case.theta)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b)


WRONG = {
    "state size": ({"state": torch.zeros(3, dtype=F64)}, "state: expected"),
    "state dtype": ({"state": torch.zeros(14)}, "state: expected"),
    "gradient count": ({"gradient": [torch.zeros(10)]}, "gradient: 1 tensors"),
    "gradient size": ({"gradient": [torch.zeros(10), torch.zeros(3)]}, r"gradient\[1\]: 3"),
    "gradient dtype": (
        {"gradient": [torch.zeros(10), torch.zeros(12, dtype=BF16)]},
        r"gradient\[1\]: dtype",
    ),
    "gradient strided": (
        {"gradient": [torch.zeros(10), torch.zeros(24)[::2]]},
        r"gradient\[1\]: expected",
    ),
    "theta strided": ({"theta": [torch.zeros(10), torch.zeros(24)[::2]]}, r"theta\[1\]: expected"),
    "theta integer": (
        {"theta": [torch.zeros(10, dtype=torch.int32)], "gradient": [torch.zeros(10).int()]},
        r"theta\[0\]: dtype",
    ),
    "theta mixed": (
        {
            "theta": [torch.zeros(10), torch.zeros(12, dtype=BF16)],
            "gradient": [torch.zeros(10), torch.zeros(12, dtype=BF16)],
        },
        r"theta\[1\]: dtype",
    ),
    "gain negative": ({"gain": -1.0}, "gain: expected a number of at least 0"),
    "gain nan": ({"gain": math.nan}, "gain: expected a number"),
    "gain inf": ({"gain": math.inf}, "gain: expected a number"),
    "momentum one": ({"momentum": 1.0}, "momentum: expected"),
    "momentum alone": ({"momentum": 0.5}, "momentum, nesterov: they need a buffer"),
    "nesterov alone": ({"nesterov": True}, "momentum, nesterov: they need a buffer"),
    "buffer alone": ({"buffer": torch.zeros(30)}, "buffer, offsets: give both"),
    "buffer dtype": (
        {"buffer": torch.zeros(30, dtype=F64), "offsets": [0, 12]},
        r"theta\[0\]: dtype",
    ),
    "buffer short": ({"buffer": torch.zeros(20), "offsets": [0, 12]}, r"offsets\[1\]: 12"),
    "offsets overlap": ({"buffer": torch.zeros(30), "offsets": [0, 5]}, r"offsets\[1\]: 5"),
    "factor dtype": ({"factor": torch.ones(1)}, "factor: expected"),
    "factor size": ({"factor": torch.ones(2, dtype=F64)}, "factor: expected 1"),
    "max_lr negative": ({"max_lr": -1.0}, "max_lr: expected a positive"),
    "max_lr inf": ({"max_lr": math.inf}, "max_lr: expected a positive"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "theta": [torch.ones(10), torch.ones(12)],
        "gradient": [torch.ones(10), torch.ones(12)],
        "state": ops.new_state("cpu", h_ema=2.0, accepted=1.0),
    }
    arguments |= replaced
    before = [t.clone() for t in arguments["theta"]]
    with pytest.raises(RuntimeError, match=message):
        ops.descend_(**arguments)
    for now, then in zip(arguments["theta"], before, strict=True):
        assert_same_bits(now, then)
