"""The steps with k curvatures of the CUDA backend, held against the CPU's to the last bit."""

import math

import pytest

import simt_library
from lyapcuda import ops
from ops_cases import BF16, F16, F32, F64, assert_same_bits, surroundings
from quasi_newton_cases import KINDS, newton_case, set_field, step_arguments, step_options

pytestmark = pytest.mark.usefixtures("library")


def step(case, kind, max_lr=10.0):
    options = step_options(case, kind)
    slopes = ops.panel_slopes_(*step_arguments(case), **options)
    # What follows is exact given the slopes: both backends go on with the same ones.
    rounded = slopes.float().double()
    return slopes, ops.panel_descend_(*step_arguments(case), rounded, max_lr=max_lr, **options)


@pytest.mark.parametrize("k", [1, 3, 8, 9, 32])
@pytest.mark.parametrize("storage", [F32, F64, BF16, F16])
def test_steps_are_the_cpus(storage, k):
    few = [4097, 5, 0, (3, 11), 257]
    for kind in KINDS:
        for shift, gap in ((0, 32), (0, 5), (1, 16)):
            # Of three rows more than a launch takes, where all is aligned.
            many = simt_library.SEGMENTS if k == 3 else 20
            sizes = few if shift or gap == 5 else [*few, *[40] * many]
            values = {"accepted": 1.0, "pending": 1.0}
            for changed in ({}, {"pending": 0.0}, {"accepted": 0.0}, {"h_ema": math.nan}):
                if changed and (sizes is few or kind is not KINDS[-1]):
                    continue
                here, there = (
                    newton_case(k, sizes, storage, shift=shift, gap=gap) for _ in range(2)
                )
                for case in (here, there):
                    for name, value in {**values, **changed}.items():
                        set_field(case, name, value)
                slopes, rates = step(here, kind)
                with simt_library.cpu():
                    expected, expected_rates = step(there, kind)
                # Sums of doubles in another order.
                assert ((slopes - expected).abs() <= 1e-13 * (1 + expected.abs()) * 1e3).all()
                assert_same_bits(rates, expected_rates)
                for a, b in zip(here.tensors(), there.tensors(), strict=True):
                    assert_same_bits(a, b)
                    assert_same_bits(surroundings(a), surroundings(b))
