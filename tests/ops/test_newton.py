"""slopes_ and descend_: the rates they take, and where there is no step."""

import math

import pytest
import torch

from lyapcuda import ops
from lyapcuda.ops import reference
from op_inputs import F32, F64, assert_same_bits, cloned, eps, number, tensors_of
from op_table import MOMENTA, TABLE

pytestmark = pytest.mark.usefixtures("backend")

SLOPES, DESCEND, ALONG = TABLE["slopes_"], TABLE["descend_"], TABLE["descend_, along vectors"]


def drawn(row, k=1, sizes=(100, 7), exact=False, **form):
    return row.draw(row.inputs(list(sizes), k, exact=exact), **form)


def assert_unchanged(row, a):
    """Calls the op, which returns zeros and leaves all as it is."""
    before = cloned(a)
    assert not row.call(a).any()
    for now, then in zip(tensors_of(a), tensors_of(before), strict=True):
        assert_same_bits(now, then)


# --- one curvature -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h_ema", "accepted", "lr"),
    [
        (4.0, 1.0, 0.125),
        (0.5, 1.0, 1.0),
        (0.1, 1.0, 1.0),  # 1/h = 10, more than max_lr
        (0.0, 1.0, 1.0),
        (-0.0, 1.0, 1.0),
        (-3.0, 1.0, 1.0),
        (1e-320, 1.0, 1.0),
        (1e308, 1.0, 0.5 / 1e308),
        (4.0, 0.0, 0.0),  # the last step was not finite
        (math.nan, 1.0, 0.0),  # nothing measured yet
        (math.inf, 1.0, 0.0),
        (-math.inf, 1.0, 0.0),
    ],
)
def test_the_rate_is_gain_over_h_within_bounds(h_ema, accepted, lr):
    a = drawn(DESCEND, h_ema=h_ema, accepted=accepted, max_lr=2.0, gain=0.5)
    before, (moved, expected, _) = a["theta"][0].clone(), reference.descend_(**a)
    assert float(DESCEND.call(a)) == lr == float(expected)
    torch.testing.assert_close(a["theta"][0], moved[0].float(), rtol=4 * eps(F32), atol=1e-6)
    if lr == 0.0:
        assert_same_bits(a["theta"][0], before)


def test_no_rate_is_beyond_its_bound():
    a, h = drawn(DESCEND, sizes=[], max_lr=10.0, gain=1.9), 1e-300
    while h < 1e300:
        ops.state_field(a["state"], 1, "h_ema").fill_(h)
        assert 0.0 < float(DESCEND.call(a)) <= 19.0
        h *= 7.3


@pytest.mark.parametrize("momentum", MOMENTA)
def test_theta_stays_where_a_step_is_not_accepted_whatever_the_gradient(momentum):
    for row, k in ((DESCEND, 1), (SLOPES, 3), (ALONG, 3)):
        for refused in ({"accepted": 0.0}, {"h_ema": math.nan}, {"factor": math.inf}):
            a = drawn(row, k, **MOMENTA[momentum], **refused)
            a["gradient"][0].fill_(math.nan)
            assert_unchanged(row, a)


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_a_factor_multiplies_the_rate(factor):
    a = drawn(DESCEND, exact=True, factor=factor, momentum=0.5, gain=1.0)
    b = drawn(DESCEND, exact=True, factor=1.0, momentum=0.5, gain=factor)
    assert_same_bits(DESCEND.call(a), DESCEND.call(b))
    written = [tensors_of([x["theta"], x["buffer"]]) for x in (a, b)]
    for x, y in zip(*written, strict=True):
        assert_same_bits(x, y)


def test_no_parameters_still_give_the_rate():
    state = ops.new_state("cpu", h_ema=3.7, accepted=1.0)
    assert float(ops.descend_([], [], state)) == 1 / 3.7


# --- curvatures along a panel --------------------------------------------------------------------


def test_it_is_the_newton_step_of_a_quadratic():
    """Where the panel spans the Hessian's leading vectors, θ moves by the pseudo-inverse there."""
    n, k = 40, 3
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    h = torch.cat([torch.tensor([9.0, 5.0, 2.0]), torch.full((n - 3,), 0.5)]).double()
    hessian = basis @ torch.diag(h) @ basis.T
    theta = torch.randn(n, generator=generator, dtype=F64)
    mixing = torch.randn(k, k, generator=generator, dtype=F64)
    panel = (mixing.T @ (0.1 * basis[:, :k]).T).contiguous()
    state = ops.new_state(
        "cpu", k, perturbation=0.1, accepted=1.0, pending=1.0, residual=0.0,
        h_ema=h[:k], transform=torch.linalg.inv(mixing),
    )  # fmt: skip
    step = ([theta], [hessian @ theta])
    slopes = ops.slopes_(*step, [0], panel, state)
    expected = theta - basis @ torch.diag(1 / h.clamp(min=2.0)) @ basis.T @ hessian @ theta
    rates = ops.descend_(*step, state, offsets=[0], panel=panel, slopes=slopes)
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
    for gain in (1.0, 0.5):
        a = drawn(ALONG, 2, sizes=[10], **values) | {"max_lr": max_lr, "gain": gain}
        before = a["theta"][0].clone()
        assert ALONG.call(a).tolist() == pytest.approx([gain * r for r in rates], rel=1e-15)
        assert torch.equal(a["theta"][0], before) == (rates[0] == 0.0)


@pytest.mark.parametrize("row", [SLOPES, ALONG], ids=["slopes_", "descend_"])
def test_where_the_copies_met_the_panel_is_not_read(row):
    a = drawn(row, 3, momentum=0.5, pending=0.0)
    a["panel"].fill_(math.nan)
    other = drawn(row, 3, momentum=0.5, pending=0.0)
    assert_same_bits(row.call(a), row.call(other))
    for name in ("theta", "buffer"):
        for x, y in zip(tensors_of(a[name]), tensors_of(other[name]), strict=True):
            assert_same_bits(x, y)


def test_the_buffer_moves_the_same_where_the_copies_met():
    met, other = drawn(SLOPES, 3, momentum=0.5, pending=0.0), drawn(SLOPES, 3, momentum=0.5)
    assert not SLOPES.call(met).any() and SLOPES.call(other).all()
    assert_same_bits(met["buffer"], other["buffer"])


def test_theta_stays_where_a_slope_is_not_finite():
    a = drawn(ALONG, 3)
    a["slopes"][0] = math.nan
    assert_unchanged(ALONG, a)
    assert_unchanged(ALONG, drawn(ALONG, 3) | {"factor": number(math.nan)})
