"""The state of a panel: its fields, and new ones."""

import math

import pytest
import torch

from lyapcuda import ops
from ops_cases import F64
from panel_cases import COUNTS


@pytest.mark.parametrize("k", COUNTS)
def test_the_fields_of_a_state_follow_each_other(k):
    end = 0
    for offset, shape in ops.panel_fields(k).values():
        assert offset == end and shape in ((), (k,), (k, k))
        end += math.prod(shape)
    state = ops.new_panel_state("cpu", k, beta=2.0, h=torch.arange(k, dtype=F64))
    assert state.shape == (end,) and state.dtype == F64
    zero = {"bound", "guard", "pending", "again", "accepted", "steps", "skipped", "transform"}
    zero |= {"reseed", "reseeds"}
    for name in ops.panel_fields(k):
        value = ops.panel_field(state, k, name)
        if name == "beta":
            assert (value == 2).all()
        elif name == "h":
            assert torch.equal(value, torch.arange(k, dtype=F64))
        else:
            assert (value == 0).all() if name in zero else value.isnan().all(), name


@pytest.mark.parametrize("k", [0, 33, -1])
def test_a_count_out_of_range_has_no_state(k):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 32"):
        ops.new_panel_state("cpu", k)


def test_a_field_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="unknown panel state fields: .'lamda'"):
        ops.new_panel_state("cpu", 3, lamda=1.0)
