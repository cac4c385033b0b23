"""The state of k separations: its fields, and new ones."""

import math

import pytest
import torch

from lyapcuda import ops
from op_inputs import COUNTS, F64


@pytest.mark.parametrize("k", COUNTS)
def test_the_fields_of_a_state_follow_each_other(k):
    end = 0
    for offset, shape in ops.state_fields(k).values():
        assert offset == end and shape in ((), (k,), (k, k))
        end += math.prod(shape)
    state = ops.new_state("cpu", k, beta=2.0, h=torch.arange(k, dtype=F64))
    assert state.shape == (end,) and state.dtype == F64
    known = dict.fromkeys(("bound", "guard", "again", "accepted", "steps", "skipped"), 0)
    known |= dict.fromkeys(("reseed", "reseeds", "refined"), 0) | {"beta": 2, "displacement": 1}
    # One separation is q itself until a step says otherwise.
    known |= dict.fromkeys(("pending", "transform"), float(k == 1))
    for name in ops.state_fields(k):
        value = ops.state_field(state, k, name)
        if name == "h":
            assert torch.equal(value, torch.arange(k, dtype=F64))
        else:
            assert (value == known[name]).all() if name in known else value.isnan().all(), name


@pytest.mark.parametrize("k", [0, 33, -1])
def test_a_count_out_of_range_has_no_state(k):
    with pytest.raises(ValueError, match=f"k={k}: expected 1 to 32"):
        ops.new_state("cpu", k)


def test_a_field_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="unknown state fields: .'lamda'"):
        ops.new_state("cpu", 3, lamda=1.0)
