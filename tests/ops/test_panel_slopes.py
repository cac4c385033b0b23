"""panel_slopes_ against its fp64 oracle, and the momentum's buffer to the last bit."""

import itertools
import math

import pytest
import torch

from lyapcuda import ops
from ops_cases import (
    BF16,
    F64,
    STORAGE,
    TAILS,
    assert_same_bits,
    threads,
)
from panel_cases import COUNTS
from quasi_newton_cases import (
    KINDS,
    check_slopes,
    newton_case,
    set_field,
    step_arguments,
    step_options,
)


@pytest.mark.parametrize("size", TAILS[:-1])
@pytest.mark.parametrize("storage", STORAGE)
def test_every_size_exactly(storage, size):
    for kind in KINDS:
        for k in (1, 5):
            check_slopes(
                newton_case(k, [size], storage, exact=True, shift=size % 3), kind, exact=True
            )


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("storage", STORAGE)
def test_any_number_of_rows_and_segments(storage, k):
    sizes = [9, 0, (), (3, 0, 2), 4097, (33, 7), 1]
    for shift, kind in itertools.product((0, 1), KINDS):
        check_slopes(newton_case(k, sizes, storage, shift=shift), kind)


@pytest.mark.parametrize(
    ("values", "factor"),
    [({"accepted": 0.0}, 1.0), ({"h_ema": math.nan}, 1.0), ({}, math.nan), ({}, math.inf)],
)
def test_without_a_step_there_are_no_slopes_and_the_buffer_stays(values, factor):
    case = newton_case(3, [100, 7], **values)
    case.g0[0].fill_(math.nan)
    before = case.p.clone()
    options = step_options(case, KINDS[1], factor=torch.tensor([factor], dtype=F64))
    assert not ops.panel_slopes_(*step_arguments(case), **options).any()
    assert_same_bits(case.p, before)


def test_where_the_copies_met_only_the_buffer_moves():
    case, other = newton_case(3, [100, 7]), newton_case(3, [100, 7])
    set_field(case, "pending", 0.0)
    case.d.fill_(math.nan)  # not read
    assert not ops.panel_slopes_(*step_arguments(case), **step_options(case, KINDS[1])).any()
    ops.panel_slopes_(*step_arguments(other), **step_options(other, KINDS[1]))
    assert_same_bits(case.p, other.p)


def test_a_run_gives_the_same_bits_on_any_number_of_threads():
    results = []
    for count in (1, 2, 2):
        case = newton_case(5, [70001, 16385], BF16)
        with threads(count):
            results.append(ops.panel_slopes_(*step_arguments(case), **step_options(case, KINDS[2])))
            results.append(case.p)
    for first in (0, 1):
        for result in results[first + 2 :: 2]:
            assert_same_bits(result, results[first])


WRONG = {
    "state of another k": ({"state": ops.new_state("cpu")}, "state: expected"),
    "panel dtype": ({"panel": torch.zeros(3, 30, dtype=BF16)}, "panel: expected float32"),
    "panel short": ({"panel": torch.zeros(3, 20)}, r"offsets\[1\]"),
    "panel rows": ({"panel": torch.zeros(33, 30)}, "panel: 33 rows"),
    "gradient dtype": ({"gradient": [torch.zeros(10).double()] * 2}, r"gradient\[0\]"),
    "theta dtype": ({"theta": [torch.zeros(10, dtype=torch.int32)] * 2}, "gradient|theta"),
    "buffer short": ({"buffer": torch.zeros(20)}, "buffer: rows of 20"),
    "buffer dtype": ({"buffer": torch.zeros(30).double()}, "buffer: dtype"),
    "momentum alone": ({"momentum": 0.5}, "momentum, nesterov"),
    "momentum large": ({"momentum": 1.5, "buffer": torch.zeros(30)}, "momentum: expected"),
    "factor dtype": ({"factor": torch.ones(1)}, "factor: expected"),
}


def good_arguments():
    return {
        "theta": [torch.ones(10), torch.ones(12)],
        "gradient": [torch.ones(10), torch.ones(12)],
        "offsets": [2, 14],
        "panel": torch.ones(3, 30),
        "state": ops.new_panel_state("cpu", 3, h_ema=2.0, accepted=1.0, pending=1.0),
    }


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    replaced, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=message):
        ops.panel_slopes_(**{**good_arguments(), **replaced})
