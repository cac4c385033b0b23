"""Whole runs on the CUDA backend measure what they do on the CPU's: on the emulator, with the warps
of a block in either order, and where there is a GPU, there.

What needs a GPU is in test_gpu.py.
"""

import math

import pytest
import torch

import lyapcuda
import nets
import simt_library
from lyapcuda import ops
from op_inputs import F32, F64, assert_same_bits
from op_table import TABLE

pytestmark = pytest.mark.usefixtures("library")

LOSSES = torch.tensor([0.3, 0.4], dtype=F64)


@pytest.mark.skipif("cuda" in simt_library.HERE, reason="the tests here run on it")
def test_there_is_a_gpu():
    pytest.skip(simt_library.missing("cuda"))


def measured(name, dtype, steps, **options):
    """h and the interval of every step on a tiny net that is trained meanwhile."""
    case = nets.case(name, 1, dtype)
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), weight_decay=0.01, **options)
    trainer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    values = []
    for _ in range(steps):
        tracker.step(case.closure, leave_grad=True)
        trainer.step()
        values.append([float(tracker.h), float(tracker.beta), *tracker.interval.tolist()])
    return torch.tensor(values, dtype=F64), tracker.vector()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "SA"},
        {"estimate": "growth", "momentum": 0.5},
        {"estimate": "paper", "beta": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tanh_mlp", "conv"])
def test_a_tracker_measures_what_it_does_on_the_cpu(name, options):
    actual, q = measured(name, F64, 12, **options)
    with simt_library.cpu():
        expected, q_expected = measured(name, F64, 12, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(q, q_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_tracker_of_less_precision_measures_what_it_does_on_the_cpu(dtype):
    # The elements are the same to the bit; only the sums' last digits differ. One step, since from
    # the second on these move roundings of q.
    actual, _ = measured("gelu_mlp", dtype, 1)
    with simt_library.cpu():
        expected, _ = measured("gelu_mlp", dtype, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def trained(steps):
    case = nets.case("gelu_mlp", 2, F64)
    optimizer = lyapcuda.LyapunovSGD(case.model.parameters(), warmup_iterations=20, max_lr=1.0)
    return [float(optimizer.step(case.closure)) for _ in range(steps)]


@pytest.mark.filterwarnings("ignore:h0 was not stable")
def test_the_optimizer_takes_the_steps_it_takes_on_the_cpu():
    actual = trained(8)
    with simt_library.cpu():
        expected = trained(8)
    assert actual == pytest.approx(expected, rel=1e-10)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"sign": -1, "estimate": 1}, {"momentum": 0.5, "rotate": False}, {"estimate": 2}],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 4, 14, 32])
def test_k_separations_of_a_quadratic_run_as_on_the_cpu(k, options):
    n, momentum = 400, options.get("momentum", 0.0)
    curvature = torch.linspace(-2, 8, n, dtype=F64)

    def run():
        generator = torch.Generator().manual_seed(5)
        theta = torch.randn(n, generator=generator, dtype=F64)
        start = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))[0].T * 0.1
        q, d, p, p_next = (start.contiguous(), *torch.zeros(3, k, n, dtype=F64).unbind())
        copies = torch.empty(k, n, dtype=F64)
        beta = 1.0 if options.get("estimate") == 2 else 0.0
        state = ops.new_state("cpu", k, perturbation=0.1, beta=beta)
        field = {name: ops.state_field(state, k, name) for name in ops.state_fields(k)}
        values = []
        for _ in range(12):
            heavy = {"p": p, "p_next": p_next} if momentum else {}
            ops.recenter_(q, copies, d, [theta], [0], state, **heavy)
            field["pending"].fill_(float(k == 1))
            g0, g1 = curvature * theta, curvature * copies
            sign, moved = options.get("sign", 1), {"momentum": momentum, **heavy}
            gram = ops.ascent_(d, q, [g0], g1, [0], state, sign=sign, **moved)
            ops.benettin_(state, gram, LOSSES, k, ema=0.5, **options)
            if k > 1:
                ops.combine_(d, d, field["transform"], gate=field["again"])
                ops.benettin_refine_(state, ops.gram(d, d, gate=field["again"]), k)
            else:
                q, d, p, p_next = d, q, p_next, p
            names = ("rayleigh", "h", "center", "exponent", "beta")
            values.append(torch.cat([field[name].flatten() for name in names]))
        return torch.stack(values)

    actual = run()
    with simt_library.cpu():
        expected = run()
    # Rounding grows with the run, in the separations as in h.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert expected[-1, :k].isfinite().all()


def test_a_gradient_that_is_not_finite_leaves_the_state_alone():
    row = TABLE["ascent_"]
    for k in (1, 3):
        a = row.arguments(row.inputs([300], k), "plain")
        a["g1"][0, 17] = math.inf
        before = a["state"].clone()
        ops.benettin_(a["state"], row.call(a), LOSSES, k)
        changed = {"accepted": 0.0, "pending": 0.0, "again": 0.0, "reseed": 0.0, "skipped": 3.0}
        for name, value in changed.items():
            assert float(ops.state_field(a["state"], k, name)) == value
            ops.state_field(before, k, name).fill_(value)
        assert_same_bits(a["state"], before)
