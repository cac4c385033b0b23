"""exponent_ and secant_: the scalars of a step against their oracle, and what they mean."""

import itertools
import math
import random

import pytest
import torch

from lyapcuda import _C, ops
from lyapcuda.ops import reference
from ops_cases import F32, F64, assert_same_bits, fields_of, state_with

NAN, INF = math.nan, math.inf
OPTIONS = [
    dict(zip(("sign", "estimate", "momentum", "control", "alternate"), values, strict=True))
    for values in itertools.product(
        (1, -1), ops.ESTIMATES.values(), (0.0, 0.9), (True, False), (True, False)
    )
]


def sums_of(q, y, beta, sign=1, carried=None):
    """The sums of a plain step with separation q and gradient difference y."""
    d = q + sign * beta * y
    carried = q if carried is None else carried
    return torch.stack(
        [(a * b).sum() for a, b in ((d, d), (q, q), (q, y), (y, y), (carried, q), (carried, y))]
    )


def random_step(rng):
    """A state and sums as a run may meet them, special cases more often than in life."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    q = torch.randn(12, generator=generator, dtype=F64) * 10 ** rng.uniform(-8, 4)
    h = rng.choice([1, -1]) * 10 ** rng.uniform(-3, 4)
    noise = rng.choice([0.0, 0.01, 1.0]) * torch.randn(12, generator=generator, dtype=F64)
    y = h * (q + noise * q.norm() / 4)
    beta = rng.choice([0.0, 1.0, 10 ** rng.uniform(-5, 2), 1 / abs(h), -0.3])
    carried = q * (1 + 1e-3 * torch.randn(12, generator=generator, dtype=F64))
    sums = sums_of(q, y, beta, rng.choice([1, -1]), carried)
    special = rng.random()
    if special < 0.1:
        sums[0] = 0.0  # the copies met
    elif special < 0.2:
        sums[2:4] = sums[5] = 0.0  # no gradient difference
    elif special < 0.25:
        sums[rng.randrange(6)] = rng.choice([NAN, INF, -INF])
    elif special < 0.3:
        sums[1] = rng.choice([0.0, -1.0])
    elif special < 0.35:
        sums[4] = rng.choice([0.0, -1.0])
    elif special < 0.4:
        sums[0] = 10.0 ** rng.uniform(-300, 300)
    first = rng.random() < 0.3
    state = ops.new_state(
        "cpu",
        perturbation=10 ** rng.uniform(-4, 0),
        scale=rng.choice([1, -1]) * rng.random(),
        beta=beta,
        rayleigh=NAN if first else h * rng.uniform(0.5, 1.5),
        h_ema=NAN if first else h * rng.uniform(0.5, 1.5),
        guard=rng.choice([0.0, 10 ** rng.uniform(-3, 4)]),
        committed=float(rng.random() < 0.5),
        steps=float(rng.randrange(100)),
        skipped=float(rng.randrange(3)),
    )
    losses = torch.tensor([rng.choice([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, NAN, INF]), 2.0], dtype=F64)
    return state, sums, losses


def check(state, sums, losses, **options):
    expected = fields_of(reference.exponent_(state, sums, losses, **options))
    before, sums_before = fields_of(state), sums.clone()
    ops.exponent_(state, sums, losses, **options)
    actual = fields_of(state)
    assert_same_bits(sums, sums_before)
    for name, value in expected.items():
        got = actual[name]
        if name == "residual" and actual["accepted"]:
            # A difference of large terms: compare it as a square, to their rounding.
            dd, qq, qy, yy, cq, cy = sums.tolist()
            terms = (yy + 2 * abs(cy / cq * qy)) / qq + (cy / cq) ** 2
            assert abs(got**2 - value**2) <= 8 * 2.0**-52 * terms
        elif math.isnan(value):
            assert math.isnan(got), (name, got, options)
        else:  # a few roundings, in another order
            assert math.isclose(got, value, rel_tol=8 * 2.0**-52), (name, got, value, options)
    if not actual["accepted"]:
        for name in set(actual) - {"accepted", "committed", "skipped", "reseed", "reseeds"}:
            assert actual[name] == before[name] or math.isnan(before[name])
        assert actual["committed"] == 0.0 and actual["skipped"] == before["skipped"] + 1
    return actual


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_with_every_option(seed):
    rng = random.Random(seed)
    outcomes = set()
    for options in OPTIONS:
        for _ in range(60):
            state, sums, losses = random_step(rng)
            after = check(state, sums, losses, **options, ema=rng.choice([0.0, 0.9]))
            outcomes.add((after["accepted"], after["committed"]))
    assert outcomes == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", range(8))
def test_anything_not_finite_changes_nothing_but_the_counts(at, bad):
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=1.0, h=2.0, h_ema=2.0, guard=1.0)
    values = [1.5, 1.0, 0.5, 1.0, 1.0, 0.5, 0.3, 0.4]
    values[at] = bad
    sums, losses = torch.tensor(values, dtype=F64).split([6, 2])
    before = fields_of(state)
    ops.exponent_(state, sums.clone(), losses.clone())
    after = fields_of(state)
    changed = {n for n in after if str(after[n]) != str(before[n])}
    assert changed == {"committed", "skipped"}  # accepted was 0 already
    assert after["committed"] == 0.0 and after["skipped"] == 1.0


@pytest.mark.parametrize("estimate", ops.ESTIMATES.values())
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_rate_of_zero_falls_back_on_the_rayleigh_quotient(estimate, momentum):
    q = torch.ones(4, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.0)
    sums = sums_of(q, 3 * q, 0.0)
    after = check(state, sums, torch.ones(1, dtype=F64), estimate=estimate, momentum=momentum)
    assert after["h"] == 3.0 == after["rayleigh"] and after["exponent"] == 0.0


@pytest.mark.parametrize("rayleigh", [2.0, -2.0, 0.5, 0.0])
def test_schwarz_is_the_quotient_of_the_step_alone(rayleigh):
    q, across = torch.eye(4, dtype=F64)[:2]
    state = ops.new_state(
        "cpu", perturbation=0.1, scale=0.1, beta=0.3, rayleigh=5.0, residual=3.0, h_ema=1.0
    )
    sums = sums_of(q, rayleigh * q + across, 0.3)
    after = check(state, sums, torch.ones(1, dtype=F64), estimate=3, ema=0.5)
    # y·y/(q·y), but at most a residual away from ρ; at ρ = 0 it has no side to lie on.
    s = {2.0: 2.5, -2.0: -2.5, 0.5: 1.5, 0.0: 0.0}[rayleigh]
    assert after["h"] == after["center"] == pytest.approx(s, rel=1e-14)
    assert after["h_ema"] == pytest.approx((s + 1.0) / 2)
    before = 5.0 + 9.0 / 5.0
    assert after["width"] == pytest.approx(math.hypot(1.0, s - rayleigh) + abs(s - before) / 2)


def test_copies_that_met_keep_the_separation_and_step_less_far():
    q = torch.ones(4, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.5)
    sums = sums_of(q, 2 * q, 0.5, sign=-1)
    assert sums[0] == 0
    after = check(state, sums, torch.ones(1, dtype=F64), sign=-1, estimate=1)
    assert (after["accepted"], after["committed"]) == (1.0, 0.0)
    assert after["scale"] == 0.1 and after["beta"] == 0.25 and after["h"] == 2.0
    assert math.isnan(after["exponent"])


@pytest.mark.parametrize("lost", ["no separation", "copies that met", "one that was turned round"])
@pytest.mark.parametrize("estimate", ops.ESTIMATES.values())
def test_a_separation_that_is_lost_is_to_be_made_anew(lost, estimate):
    q = torch.ones(4, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.5, steps=3.0, reseeds=1.0)
    sums = sums_of(q, -2 * q, 0.5)
    if lost != "copies that met":
        sums[1 if lost == "no separation" else 4] = 0.0
    after = check(state, sums, torch.ones(1, dtype=F64), estimate=estimate, control=False)
    counted = lost == "copies that met"
    assert (after["reseed"], after["reseeds"], after["accepted"]) == (1.0, 2.0, float(counted))
    assert (after["committed"], after["scale"], after["beta"]) == (0.0, 0.1, 0.5)
    # The next step that counts, and one that isn't finite, ask for nothing.
    for bad in (1.0, NAN):
        again = state.clone()
        losses = torch.full((1,), bad, dtype=F64)
        after = check(again, sums_of(q, 2 * q, 0.5), losses, estimate=estimate, control=False)
        assert (after["reseed"], after["reseeds"]) == (0.0, 2.0)


@pytest.mark.parametrize("estimate", ops.ESTIMATES.values())
def test_a_rate_stays_one_that_float32_holds(estimate):
    q = torch.ones(4, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=1e37)
    after = check(state, sums_of(q, 1e-43 * q, 1e37), torch.ones(1, dtype=F64), estimate=estimate)
    assert after["beta"] == (1e37 if estimate == 2 else 1e38)


def test_the_scale_brings_d_back_to_the_perturbation_on_the_other_side():
    q = torch.full((4,), 0.05, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=1.0, beta=0.5)
    for step in range(4):
        sums = sums_of(q, 2 * q, 0.5)
        ops.exponent_(state, sums, torch.ones(1, dtype=F64), control=False)
        after = fields_of(state)
        assert math.isclose(abs(after["scale"]) * math.sqrt(float(sums[0])), 0.1, rel_tol=1e-15)
        assert after["scale"] < 0  # d lies where q did: the next q is on the other side
        assert after["steps"] == step + 1


@pytest.mark.parametrize(
    ("sign", "h", "momentum"),
    [
        (1, 2.0, 0.0),
        (1, -0.4, 0.0),
        (-1, -2.0, 0.0),
        (-1, 0.4, 0.0),
        (1, 2.0, 0.9),
        (-1, -2.0, 0.9),
    ],
)
def test_an_eigenvector_gives_its_eigenvalue_by_either_estimate(sign, h, momentum):
    # The stationary growth of the map p' = m·p + h·q, q' = q + b·p': the larger root of
    # μ² − (1 + m + b·h)·μ + m = 0 (for m = 0, μ = 1 + b·h).
    b = sign * 0.5
    trace = 1 + momentum + b * h
    discriminant = trace * trace - 4 * momentum  # below 0 the growth would oscillate
    mu = (trace + math.sqrt(discriminant)) / 2
    measured = _C.curvature_of_growth(math.log(mu), b, momentum, ops.ESTIMATES["growth"])
    assert math.isclose(measured, h, rel_tol=1e-13)


def test_the_paper_mode_converges_to_its_own_value():
    # λ = 1 at β·h = e − 1, and h is read as λ/β: low by e − 1.
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=1.0)
    q = torch.full((4,), 0.05, dtype=F64)
    for _ in range(60):
        beta = fields_of(state)["beta"]
        sums = sums_of(q, 17.9 * q, beta)
        ops.exponent_(state, sums, torch.ones(1, dtype=F64), estimate=2, alternate=False)
    after = fields_of(state)
    assert math.isclose(after["exponent"], 1.0, rel_tol=1e-6)
    assert math.isclose(after["h"], 17.9 / (math.e - 1), rel_tol=1e-6)


def test_the_average_starts_at_the_first_value():
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.5)
    q = torch.ones(4, dtype=F64)
    for h, expected in ((2.0, 2.0), (4.0, 2.2), (4.0, 2.38)):
        sums, losses = sums_of(q, h * q, 0.5), torch.ones(1, dtype=F64)
        ops.exponent_(state, sums, losses, ema=0.9, alternate=False)
        assert math.isclose(fields_of(state)["h_ema"], expected, rel_tol=1e-14)


# --- secant_ --------------------------------------------------------------------------------------


def test_random_secants():
    rng = random.Random(0)
    for _ in range(500):
        state, sums, _ = random_step(rng)
        sign = rng.choice([1, -1])
        expected = fields_of(reference.secant_(state, sums, sign=sign))
        ops.secant_(state, sums, sign=sign)
        for name, value in fields_of(state).items():
            same = math.isclose(value, expected[name], rel_tol=4 * 2.0**-52)
            assert same or math.isnan(value) and math.isnan(expected[name]), name


@pytest.mark.parametrize("h", [3.0, -3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_secant_sets_the_rate_and_guards_the_unwanted_end(h, sign):
    q = torch.ones(4, dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.0)
    ops.secant_(state, sums_of(q, h * q, 0.0), sign=sign)
    after = fields_of(state)
    assert math.isclose(after["beta"] * 3.0, math.e - 1, rel_tol=1e-15)
    assert after["guard"] == (3.0 if h * sign < 0 else 0.0)
    ops.secant_(state, sums_of(q, sign * 1.0 * q, 0.0), sign=sign)
    # A smaller secant later: the guard stays, and so does the bound of a descent.
    bound = 3.0 if h * sign < 0 or sign < 0 else 0.98 * 3.0
    assert math.isclose(fields_of(state)["beta"] * bound, math.e - 1, rel_tol=1e-15)


def test_a_mixture_of_both_ends_guards_nothing():
    # ρ = −1, but ‖y − ρq‖ is larger: q has not settled on the unwanted end.
    q = torch.tensor([1.0, 0.0], dtype=F64)
    state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.0)
    ops.secant_(state, sums_of(q, torch.tensor([-1.0, 7.0], dtype=F64), 0.0))
    after = fields_of(state)
    assert after["guard"] == 0.0
    assert math.isclose(after["beta"] * math.sqrt(50), math.e - 1, rel_tol=1e-15)


def test_with_alternating_sides_h_is_the_mean_of_both():
    q = torch.ones(4, dtype=F64)
    for alternate, expected in ((True, [2.0, 3.0, 4.0]), (False, [2.0, 4.0, 4.0])):
        state = ops.new_state("cpu", perturbation=0.1, scale=0.1, beta=0.5)
        for h, mean in zip((2.0, 4.0, 4.0), expected, strict=True):
            sums, losses = sums_of(q, h * q, 0.5), torch.ones(1, dtype=F64)
            ops.exponent_(state, sums, losses, alternate=alternate)
            assert fields_of(state)["h"] == mean


def test_no_secant_leaves_the_rate():
    state = ops.new_state("cpu", beta=0.7)
    for sums in ([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [NAN] * 6, [0.0] * 6):
        before = state.clone()
        ops.secant_(state, torch.tensor(sums, dtype=F64))
        assert_same_bits(state, before)


# --- wrong arguments ------------------------------------------------------------------------------

WRONG = {
    "state size": ({"state": torch.zeros(13, dtype=F64)}, "state: expected"),
    "state dtype": ({"state": torch.zeros(14, dtype=F32)}, "state: expected"),
    "state strided": ({"state": torch.zeros(28, dtype=F64)[::2]}, "state: expected"),
    "sums size": ({"sums": torch.zeros(5, dtype=F64)}, "sums: expected"),
    "sums dtype": ({"sums": torch.zeros(6)}, "sums: expected"),
    "sign": ({"sign": 2}, "sign: expected 1"),
}
WRONG_EXPONENT = {
    "losses dtype": ({"losses": torch.zeros(2)}, "losses: expected"),
    "losses strided": ({"losses": torch.zeros(4, dtype=F64)[::2]}, "losses: expected"),
    "estimate": ({"estimate": 4}, "estimate: expected 0 to 3"),
    "estimate negative": ({"estimate": -1}, "estimate: expected 0 to 3"),
    "momentum one": ({"momentum": 1.0}, "momentum: expected"),
    "momentum negative": ({"momentum": -0.1}, "momentum: expected"),
    "momentum nan": ({"momentum": NAN}, "momentum: expected"),
    "ema one": ({"ema": 1.0}, "ema: expected"),
    "ema nan": ({"ema": NAN}, "ema: expected"),
}


@pytest.mark.parametrize(
    ("op", "wrong"),
    [("secant_", wrong) for wrong in WRONG]
    + [("exponent_", wrong) for wrong in (*WRONG, *WRONG_EXPONENT)],
)
def test_wrong_arguments_are_named_and_nothing_is_written(op, wrong):
    replaced, message = {**WRONG, **WRONG_EXPONENT}[wrong]
    arguments = {
        "state": ops.new_state("cpu", perturbation=1.0, scale=1.0, beta=1.0),
        "sums": torch.ones(6, dtype=F64),
    }
    if op == "exponent_":
        arguments["losses"] = torch.ones(2, dtype=F64)
    arguments |= replaced
    before = arguments["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**arguments)
    assert_same_bits(arguments["state"], before)


def test_any_number_of_losses_in_any_shape():
    for losses in (torch.zeros(0), torch.zeros(()), torch.zeros(2, 3)):
        state = state_with(ops.new_state("cpu", perturbation=1.0, scale=1.0, beta=1.0))
        ops.exponent_(state, torch.ones(6, dtype=F64), losses.double())
        assert fields_of(state)["accepted"] == 1.0
