"""The CUDA backend against the CPU's: the ops over panels, and those of a Hessian product.

As test_cuda_binding.py: on the emulator in both orders of warps, and on a GPU where there is one.
"""

import dataclasses
import itertools
import math

import pytest
import torch

import simt_library
from lyapcuda import ops
from ops_cases import (
    DTYPES,
    F32,
    F64,
    KINDS,
    LARGE,
    assert_same_bits,
    make_case,
    surroundings,
)
from panel_cases import make_panel_case, panel_ascent_options, random_panel

SIZES = [9, 0, (), (3, 0, 2), 1030, (33, 7), 1, *(k % 23 for k in range(20))]
#: More than a launch takes.
MANY = [k % 5 for k in range(simt_library.SEGMENTS * 5 // 4 + 9)]
#: (elements off alignment, gap between segments); gaps of 16 leave some segments aligned.
LAYOUTS = [(0, 16), (1, 5), (0, 5), (0, 16)]
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)


pytestmark = pytest.mark.usefixtures("library")


def copies_of(case):
    """The same case twice, views at the same distance from alignment."""
    clones = []
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if isinstance(value, torch.Tensor):
            clones.append(cloned(value))
        else:
            clones.append([cloned(v) if isinstance(v, torch.Tensor) else v for v in value])
    return case, type(case)(*clones)


def cloned(view):
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).clone()
    return whole.as_strided(view.shape, view.stride(), view.storage_offset())


def both(case, run):
    """run(case) here and on the CPU backend; everything but what it returns is the same."""
    here, there = copies_of(case)
    result = run(here)
    with simt_library.cpu():
        expected = run(there)
    for a, b in zip(here.tensors(), there.tensors(), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(surroundings(a), surroundings(b))
    return result, expected


def assert_same_sums(actual, expected, terms=0):
    """Gram matrices: to 1e-14 of the rows' lengths, or where so many terms' roundings come to more,
    as √terms steps of a random walk."""
    size, part = expected.diagonal().sqrt(), max(1e-14, math.sqrt(terms) * torch.finfo(F64).eps)
    assert_same_bits(actual, actual.T.contiguous())
    assert ((actual - expected).abs() <= part * size[:, None] * size + 1e-300).all()


# --- panels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8, 14, 17, 32])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_steps_are_the_cpus(buffer, storage, k):
    for (realised, heavy), (shift, gap) in zip(KINDS, LAYOUTS, strict=True):
        case = make_panel_case(k, SIZES, buffer, storage, shift=shift, gap=gap)

        def run(case, realised=realised, heavy=heavy):
            options = panel_ascent_options(case, realised=realised, heavy=heavy)
            step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
            return ops.panel_ascent_(*step, sign=-1, **options)

        assert_same_sums(*both(case, run))


@pytest.mark.parametrize("sizes", [[], [0], [0] * (simt_library.SEGMENTS + 9), [4097], MANY])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_any_number_of_segments_is_the_cpus(buffer, storage, sizes):
    case = make_panel_case(5, sizes, buffer, storage, gap=16)

    def step(case):
        step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        return ops.panel_ascent_(*step, theta=case.theta)

    assert_same_sums(*both(case, step))
    for pending in (0.0, 1.0):
        both(case, lambda case, pending=pending: recentered(case, pending))


def recentered(case, pending):
    ops.panel_field(case.state, case.k, "pending").fill_(pending)
    ops.panel_recenter_(case.q, case.copies, case.d, case.theta, case.offsets, case.state)


@pytest.mark.parametrize("pending", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 2, 7, 14, 32])
@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_recentrings_are_the_cpus(buffer, storage, k, pending):
    for shift, gap in ((0, 16), (0, 5), (1, 16)):
        case = make_panel_case(k, SIZES, buffer, storage, shift=shift, gap=gap)
        both(case, lambda case: recentered(case, pending))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("ka", "kb"), [(1, 1), (3, 14), (32, 32), (33, 5), (100, 128), (65, 96)])
def test_products_are_the_cpus(ka, kb, dtype):
    for n, shift in ((0, 0), (1, 0), (1029, 1), (2056, 0)):
        a = random_panel(ka, n, dtype, shift, seed=1)
        b = random_panel(kb, n, dtype, shift, seed=2)
        found = ops.gram(a, b), ops.gram(a, a), ops.gram(b, b)
        with simt_library.cpu():
            expected = ops.gram(a, b), ops.gram(a, a), ops.gram(b, b)
        size_a, size_b = (m.diagonal().sqrt() for m in expected[1:])
        assert ((found[0] - expected[0]).abs() <= 1e-14 * size_a[:, None] * size_b + 1e-300).all()
        assert_same_sums(found[1], expected[1])
        assert_same_sums(found[2], expected[2])
        # A copy is not known to be the same panel: other blocks may add up other pairs.
        copied = ops.gram(a, a.clone())
        assert ((copied - found[1]).abs() <= 1e-14 * size_a[:, None] * size_a + 1e-300).all()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("ki", "ko"), [(1, 1), (14, 14), (32, 3), (3, 32), (40, 128), (128, 7)])
def test_combinations_are_the_cpus(ki, ko, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(ki, ko, generator=generator, dtype=F64)
    for n, shift in ((0, 0), (1, 1), (1030, 0), (1029, 1), (4096, 0)):
        for gate in (None, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)):
            panel = random_panel(ki, n, dtype, shift)
            out = random_panel(ko, n, dtype, shift, seed=1)
            expected = cloned(out)
            ops.combine_(out, panel, matrix, gate=gate)
            with simt_library.cpu():
                ops.combine_(expected, panel, matrix, gate=gate)
            assert_same_bits(out, expected)
            assert_same_bits(surroundings(out), surroundings(expected))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("m", [0, 1, 14, 31, 32, 33, 100, 128])
def test_projections_are_the_cpus(m, dtype):
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(m, generator=generator, dtype=F64)
    for n, shift in ((0, 0), (1, 1), (1030, 0), (1029, 1), (4096, 0)):
        v = random_panel(max(m, 1), n, dtype, shift)[:m]
        w = random_panel(1, n, dtype, shift, seed=1)[0]
        expected = cloned(w)
        found = ops.project_(w, v, coefficients)
        with simt_library.cpu():
            sums = ops.project_(expected, v, coefficients)
        assert_same_bits(w, expected)
        length = sums[-1].sqrt() * torch.cat([v.double().norm(dim=1), sums[-1:].sqrt()])
        assert ((found - sums).abs() <= 1e-14 * length + 1e-300).all()


def orthonormal(k, n, norm):
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))[0].T * norm


@pytest.mark.parametrize(
    "options",
    [{}, {"sign": -1, "estimate": 1}, {"momentum": 0.5, "rotate": False}, {"estimate": 2}],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 4, 14, 32])
def test_whole_runs_of_k_separations_are_the_cpus(k, options):
    n, size, sign = 400, 0.1, options.get("sign", 1)
    curvature = torch.linspace(-2, 8, n, dtype=F64)

    def run():
        heavy = "momentum" in options
        theta, g0 = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=F64), None
        q, d = orthonormal(k, n, size).contiguous(), torch.zeros(k, n, dtype=F64)
        p, p_next = torch.zeros(k, n, dtype=F64), torch.zeros(k, n, dtype=F64)
        copies = torch.empty(k, n, dtype=F64)
        start = 1.0 if options.get("estimate") == 2 else 0.0
        state = ops.new_panel_state("cpu", k, perturbation=size, beta=start)
        field = {name: ops.panel_field(state, k, name) for name in ops.panel_fields(k)}
        values = []
        for _ in range(12):
            ops.panel_recenter_(q, copies, d, [theta], [0], state)
            if heavy:
                ops.combine_(p, p_next, field["transform"], gate=field["pending"])
            field["pending"].fill_(0.0)
            g0, g1 = curvature * theta, curvature * copies
            moved = {"momentum": options["momentum"], "p": p, "p_next": p_next} if heavy else {}
            gram = ops.panel_ascent_(d, q, [g0], g1, [0], state, sign=sign, **moved)
            ops.benettin_(state, gram, LOSSES, k, ema=0.5, **options)
            ops.combine_(d, d, field["transform"], gate=field["again"])
            second = ops.gram(d, d, gate=field["again"])
            ops.benettin_refine_(state, second, k)
            names = ("rayleigh", "h", "center", "exponent", "beta")
            values.append(torch.cat([field[name].flatten() for name in names]))
        return torch.stack(values)

    actual = run()
    with simt_library.cpu():
        expected = run()
    # Rounding grows with the run, in the separations as in h.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert expected[-1, :k].isfinite().all()


# --- products of the Hessian ----------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_products_of_the_hessian_are_the_cpus(buffer, storage):
    step = torch.tensor([0.0371], dtype=F64)
    for sizes, shift in itertools.product(
        (SIZES, MANY, [], [0] * (simt_library.SEGMENTS + 1), [100003]), (0, 1)
    ):
        case = make_case(sizes, buffer, storage, shift=shift, gap=16)
        found, expected = both(
            case, lambda c: ops.displace_(c.theta1, c.q, c.theta, c.offsets, step)
        )
        assert ((found - expected).abs() <= 1e-14 * expected.abs().max()).all()
        for keep, decay in itertools.product((0.0, 0.5), (0.0, 0.1)):
            options = {"keep": keep, "weight_decay": decay}
            both(
                case,
                lambda c, options=options: ops.difference_(
                    c.d, c.g0, c.g1, c.offsets, step, **options, v=c.p
                ),
            )


def test_a_large_panel_is_the_cpus():
    case = make_panel_case(3, [LARGE // 8, 33], gap=16)

    def step(case):
        step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        return ops.panel_ascent_(*step)

    assert_same_sums(*both(case, step), terms=case.q.shape[1])
    both(case, lambda case: recentered(case, 1.0))
