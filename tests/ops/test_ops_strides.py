"""Every op of torch.ops.lyapcuda refuses tensors that aren't contiguous, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from op_calls import NAMES, calls
from ops_cases import bits


def strided(tensor: torch.Tensor, step: int, transposed: bool) -> torch.Tensor:
    """The same values with other strides."""
    if transposed and tensor.dim() > 1 and min(tensor.shape) > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    spread = tensor.new_zeros((*tensor.shape, step))
    spread[..., 0] = tensor
    return spread[..., 0]


@pytest.mark.parametrize("name", NAMES)
def test_other_strides_are_refused_and_nothing_changes(name):
    op = getattr(torch.ops.lyapcuda, name.split()[0])
    arguments, options = calls()[name]
    names = [argument.name for argument in op.default._schema.arguments]
    given_ = {**dict(zip(names, arguments, strict=False)), **options}
    tried = 0
    for which, value in given_.items():
        for number, tensor in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(tensor, torch.Tensor) or tensor.numel() < 2:
                continue
            for step, transposed in ((2, False), (3, True)):
                wrong = strided(tensor, step, transposed)
                if wrong.is_contiguous():
                    continue
                changed = dict(given_)
                if isinstance(value, list):
                    changed[which] = [*value[:number], wrong, *value[number + 1 :]]
                else:
                    changed[which] = wrong
                flat = [
                    t
                    for v in changed.values()
                    for t in (v if isinstance(v, list) else [v])
                    if isinstance(t, torch.Tensor)
                ]
                before = [bits(t).clone() for t in flat]
                with pytest.raises(RuntimeError, match=which):
                    op(**changed)
                assert all(torch.equal(bits(t), b) for t, b in zip(flat, before, strict=True))
                tried += 1
    assert tried
