"""panel_descend_ against the same arithmetic in torch, to the last bit, and its fp64 oracle."""

import itertools
import math

import pytest
import torch

from lyapcuda import ops
from ops_cases import (
    BF16,
    F32,
    F64,
    STORAGE,
    TAILS,
    assert_same_bits,
    threads,
)
from panel_cases import COUNTS
from quasi_newton_cases import (
    KINDS,
    check_descend,
    newton_case,
    rates_and_weights,
    set_field,
    step_arguments,
    step_options,
    stepped_bits,
)


@pytest.mark.parametrize("size", TAILS[:-1])
@pytest.mark.parametrize("storage", STORAGE)
def test_every_size(storage, size):
    for kind in KINDS:
        for k in (1, 5):
            check_descend(newton_case(k, [size], storage, shift=size % 3), kind)


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("storage", STORAGE)
def test_any_number_of_rows_and_segments(storage, k):
    sizes = [9, 0, (), (3, 0, 2), 4097, (33, 7), 1]
    for shift, kind in itertools.product((0, 1), KINDS):
        check_descend(newton_case(k, sizes, storage, shift=shift), kind)


@pytest.mark.parametrize("storage", STORAGE)
def test_to_the_bit_where_the_weights_are_exact(storage):
    # Along the coordinates of the panel, powers of two throughout.
    for kind in KINDS:
        case = newton_case(2, [513, 33], storage, h_ema=torch.tensor([8.0, 2.0]), residual=2.0)
        ops.panel_field(case.state, 2, "transform").copy_(torch.eye(2))
        slopes = torch.tensor([0.5, -3.0], dtype=F64)
        options = step_options(case, kind)
        rates, weights = rates_and_weights(case, slopes, 1.0, 10.0)
        assert rates.tolist() == [0.125, 0.25, 0.25] and weights.tolist() == [-0.25, 0.0]
        expected = stepped_bits(case, weights, rates[-1], options)
        ops.panel_descend_(*step_arguments(case), slopes, **options)
        for actual, wanted in zip(case.theta, expected, strict=True):
            assert_same_bits(actual, wanted)


def test_it_is_the_newton_step_of_a_quadratic():
    """Where the panel spans the Hessian's leading vectors, θ moves by the pseudo-inverse there."""
    n, k = 40, 3
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    h = torch.cat([torch.tensor([9.0, 5.0, 2.0]), torch.full((n - 3,), 0.5)]).double()
    hessian = basis @ torch.diag(h) @ basis.T
    theta = torch.randn(n, generator=generator, dtype=F64)
    panel = (0.1 * basis[:, :k]).T.contiguous()
    mixing = torch.randn(k, k, generator=generator, dtype=F64)
    state = ops.new_panel_state(
        "cpu", k, perturbation=0.1, accepted=1.0, pending=1.0, residual=0.0,
        h_ema=h[:k], transform=torch.linalg.inv(mixing),
    )  # fmt: skip
    step = ([theta], [hessian @ theta], [0], (mixing.T @ panel).contiguous(), state)
    slopes = ops.panel_slopes_(*step)
    expected = theta - basis @ torch.diag(1 / h.clamp(min=2.0)) @ basis.T @ hessian @ theta
    rates = ops.panel_descend_(*step, slopes)
    torch.testing.assert_close(rates, 1 / torch.tensor([9.0, 5.0, 2.0, 2.0], dtype=F64))
    torch.testing.assert_close(theta, expected, rtol=1e-12, atol=1e-12)
    assert (basis[:, :k].T @ theta).abs().max() < 1e-12  # the leading directions are solved


@pytest.mark.parametrize(
    ("values", "max_lr", "rates"),
    [
        ({"h_ema": [8.0, 4.0], "residual": 0.0}, 10.0, [1 / 8, 1 / 4, 1 / 4]),
        ({"h_ema": [8.0, 4.0], "residual": 1.0}, 10.0, [1 / 8, 1 / 5, 1 / 5]),
        ({"h_ema": [8.0, -2.0], "residual": 0.0}, 10.0, [1 / 8, 1 / 2, 1 / 2]),
        ({"h_ema": [-8.0, -2.0], "residual": 0.0}, 10.0, [1 / 8, 1 / 2, 1 / 2]),
        ({"h_ema": [8.0, 0.0], "residual": 0.0}, 10.0, [1 / 8, 10.0, 10.0]),
        ({"h_ema": [1.0, -3.0], "residual": 0.0}, 10.0, [1 / 3, 1 / 3, 1 / 3]),
        ({"h_ema": [8.0, 4.0], "residual": 0.0, "pending": 0.0}, 10.0, [1 / 8, 1 / 4, 1 / 8]),
        ({"h_ema": [8.0, 4.0], "residual": 0.0}, 0.2, [1 / 8, 0.2, 0.2]),
        ({"h_ema": [8.0, math.nan], "residual": 0.0}, 10.0, [0.0, 0.0, 0.0]),
        ({"h_ema": [8.0, 4.0], "residual": 0.0, "accepted": 0.0}, 10.0, [0.0, 0.0, 0.0]),
    ],
)
def test_rates_are_those_of_the_curvatures_and_bounded(values, max_lr, rates):
    values = {**values, "h_ema": torch.tensor(values["h_ema"], dtype=F64)}
    case = newton_case(2, [10], F32, **values)
    before = case.theta[0].clone()
    slopes = torch.ones(2, dtype=F64)
    for gain in (1.0, 0.5):
        used = ops.panel_descend_(*step_arguments(case), slopes, gain=gain, max_lr=max_lr)
        assert used.tolist() == pytest.approx([gain * rate for rate in rates], rel=1e-15)
    assert torch.equal(case.theta[0], before) == (rates[0] == 0.0)


def test_without_vectors_the_panel_is_not_read():
    case = newton_case(3, [100, 7])
    set_field(case, "pending", 0.0)
    case.d.fill_(math.nan)
    ops.panel_descend_(*step_arguments(case), torch.zeros(3, dtype=F64))
    assert all(bool(torch.isfinite(t).all()) for t in case.theta)


@pytest.mark.parametrize("what", ["slopes", "factor"])
def test_theta_stays_where_something_is_not_finite(what):
    case = newton_case(3, [100, 7])
    before = [t.clone() for t in case.theta]
    slopes, factor = torch.ones(3, dtype=F64), torch.ones(1, dtype=F64)
    (slopes if what == "slopes" else factor)[0] = math.nan
    rates = ops.panel_descend_(*step_arguments(case), slopes, factor=factor)
    assert not rates.any()
    for now, then in zip(case.theta, before, strict=True):
        assert_same_bits(now, then)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2):
        case = newton_case(5, [70001, 16385], BF16)
        with threads(count):
            slopes = ops.panel_slopes_(*step_arguments(case))
            ops.panel_descend_(*step_arguments(case), slopes)
        results.append(case.theta)
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


WRONG = {
    "slopes size": ({"slopes": torch.zeros(2, dtype=F64)}, "slopes: expected 3"),
    "slopes dtype": ({"slopes": torch.zeros(3)}, "slopes: expected"),
    "gain": ({"gain": -1.0}, "gain: expected"),
    "max_lr": ({"max_lr": 0.0}, "max_lr: expected"),
    "panel short": ({"panel": torch.zeros(3, 20)}, r"offsets\[1\]"),
    "buffer short": ({"buffer": torch.zeros(20)}, "buffer: rows of 20"),
    "momentum alone": ({"momentum": 0.5}, "momentum, nesterov"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(wrong):
    replaced, message = WRONG[wrong]
    arguments = {
        "theta": [torch.ones(10), torch.ones(12)],
        "gradient": [torch.ones(10), torch.ones(12)],
        "offsets": [2, 14],
        "panel": torch.ones(3, 30),
        "state": ops.new_panel_state("cpu", 3, h_ema=2.0, accepted=1.0, pending=1.0),
        "slopes": torch.ones(3, dtype=F64),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.panel_descend_(**{**arguments, **replaced})
    assert all(bool((t == 1).all()) for t in arguments["theta"])
