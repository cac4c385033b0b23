"""CurvatureTracker with momentum, k = 1: against the map written down, steps that don't count among
them, and the memory that a step takes.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lyapcuda
from fault_cases import bits
from lyapcuda.dynamics.options import GrowthOptions
from lyapcuda.dynamics.separations import Separations, ends_of
from lyapcuda.objective.evaluator import Gradients
from lyapcuda.objective.pointing import at_a_copy
from lyapcuda.params.flat import FlatLayout

F64 = torch.float64
BETA, MOMENTUM, SIZE = 0.05, 0.5, 1e-3
CURVATURES = torch.tensor([5.0, 0.2, 0.1, -0.1, -0.2, 1.0, 2.0], dtype=F64)


class Bowl:
    """½·Σ h_i·θ_i² over two parameters in groups of their own; may spoil the loss at θ + q."""

    def __init__(self) -> None:
        self.parts = [nn.Parameter(torch.ones(n, dtype=F64)) for n in (4, 3)]
        self.groups = [{"params": [part], "weight_decay": 0.0} for part in self.parts]
        self.groups[1]["weight_decay"] = 0.25
        self.curvatures = CURVATURES + torch.tensor([0.0] * 4 + [0.25] * 3, dtype=F64)
        self.spoilt, self.raises = False, False

    def closure(self) -> Tensor:
        theta = torch.cat([part.flatten() for part in self.parts])
        loss = 0.5 * (CURVATURES * theta * theta).sum()
        if at_a_copy() and self.raises:
            raise OSError("the closure's own")
        return loss * math.nan if at_a_copy() and self.spoilt else loss

    def tracker(self, **options) -> lyapcuda.CurvatureTracker:
        return lyapcuda.CurvatureTracker(
            self.groups,
            estimate="growth",
            beta=BETA,
            momentum=MOMENTUM,
            perturbation=SIZE,
            debug=False,  # some evaluations are spoilt
            **options,
        )


class Eager:
    """The heavy-ball map of App. B on the same bowl, in plain torch."""

    def __init__(self, q: Tensor, curvatures: Tensor) -> None:
        self.q, self.p, self.curvatures = q, torch.zeros_like(q), curvatures
        self.exponent = math.nan

    def step(self) -> None:
        p = MOMENTUM * self.p + self.curvatures * self.q
        d = self.q + BETA * p
        self.exponent = math.log(float(d.norm() / self.q.norm()))
        scale = -SIZE / float(d.norm())  # to the other side of θ
        self.q, self.p = scale * d, scale * p


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def momentum_of(tracker: lyapcuda.CurvatureTracker) -> Tensor:
    """p, by way of a checkpoint."""
    (saved,) = tracker.state_dict()["separations"]
    return joined(saved["p"])


def assert_same_step(tracker: lyapcuda.CurvatureTracker, eager: Eager) -> None:
    close = {"rtol": 1e-9, "atol": 1e-9 * SIZE}
    assert float(tracker.exponent) == pytest.approx(eager.exponent, rel=1e-7)
    torch.testing.assert_close(joined(tracker.vector()), eager.q, **close)
    torch.testing.assert_close(momentum_of(tracker), eager.p, **close)


def interrupted(tracker, bowl):
    """A step whose closure raises at θ + q: it never was."""
    bowl.raises, before = True, bits(tracker.state_dict())
    with pytest.raises(OSError, match="own"):
        tracker.step(bowl.closure)
    bowl.raises = False
    assert bits(tracker.state_dict()) == before
    return tracker, bowl


def resumed(tracker, bowl):
    other = bowl.tracker(seed=99)
    other.load_state_dict(tracker.state_dict())
    return other, bowl


#: What is done after a step that may not have counted, before the next one.
BETWEEN = {
    "nothing": lambda *both: both,
    "deepcopy": lambda *both: copy.deepcopy(both),
    "pickle": lambda *both: pickle.loads(pickle.dumps(both)),
    "checkpoint": resumed,
    "exception": interrupted,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_steps_are_the_maps_also_around_those_that_do_not_count(backend, between):
    bowl = Bowl()
    tracker = bowl.tracker()
    tracker.step(lambda: bowl.closure() * math.nan)  # draws q; doesn't count
    eager = Eager(joined(tracker.vector()), bowl.curvatures)
    # Steps that don't count alone, twice and thrice in a row, first and last.
    for number, spoilt in enumerate([1, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1]):
        bowl.spoilt = bool(spoilt)
        tracker.step(bowl.closure)
        if not spoilt:
            eager.step()
        if number > 1:
            assert_same_step(tracker, eager)
        tracker, bowl = BETWEEN[between](tracker, bowl)
    assert (int(tracker.steps), int(tracker.skipped)) == (7, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_no_step_makes_a_buffer(backend, momentum, dtype):
    """Nothing in a step but the closure allocates what grows with N."""
    n = 4096
    theta = nn.Parameter(torch.ones(n, dtype=dtype))
    options = GrowthOptions(estimate="growth", beta=0.1, momentum=momentum)
    separations = Separations(FlatLayout([theta]), ends_of("LA", 1, n), options)
    g0, loss = torch.ones_like(theta), torch.ones((), dtype=F64)
    for spoilt in (False, False, True, True, False):
        losses = [loss * math.nan if spoilt else loss]
        with Made() as made:
            (placed,) = separations.place()
        placed[0].mul_(2.0)  # the gradients come in the memory of the copies
        with made:
            separations.advance(Gradients([g0], [placed], loss, losses))
        assert made.most < n / 8, made.most
    assert float(separations.values("skipped")) == 2


class Made(TorchDispatchMode):
    """The elements of the largest tensor that is made, rather than a view of one that was given."""

    most = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in([args, kwargs])}
        result = op(*args, **kwargs)
        for tensor in tensors_in(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // 8)
        return result


def tensors_in(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
