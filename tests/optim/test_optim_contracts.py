"""What torch tests of its own optimizers, of LyapunovSGD: states, names, hooks, duplicates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from fault_cases import bits
from optim_cases import exact

OPTIONS = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "capturable": True}]


class Problem:
    """weight·x + bias, with gradients cleared and found in the closure, as torch's tests do."""

    def __init__(self, named=False, **options):
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.x = torch.randn(3, generator=generator)
        params = [("weight", self.weight), ("bias", self.bias)]
        params = params if named else [p for _, p in params]
        self.optimizer = exact(params, 0.1, warmup_tol=1e-2, **options)

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss

    def run(self, steps=3):
        for _ in range(steps):
            self.optimizer.step(self.closure)

    def go_on_from(self, other, saved=None):
        with torch.no_grad():
            self.weight.copy_(other.weight), self.bias.copy_(other.bias)
        self.optimizer.load_state_dict(saved or other.optimizer.state_dict())


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_parameters_have_equal_states(options):
    one, two = Problem(**options), Problem(**options)
    one.run()
    saved = one.optimizer.state_dict()
    before = bits(copy.deepcopy(saved))
    two.go_on_from(one, saved)
    one.run(), two.run()
    assert bits(one.optimizer.state_dict()) == bits(two.optimizer.state_dict())
    assert bits(saved) == before
    two.optimizer.param_groups.extend(two.optimizer.param_groups)
    last = [each.optimizer.state_dict()["param_groups"][-1] for each in (one, two)]
    assert bits(last[0]) == bits(last[1])


@pytest.mark.parametrize("options", OPTIONS)
def test_settings_that_an_older_state_lacks_are_the_defaults(options):
    one, two = Problem(**options), Problem(**options)
    one.run()
    saved = one.optimizer.state_dict()
    for name in ("capturable", "nesterov", "weight_decay", "max_inverse_h"):
        del saved["param_groups"][0][name]
    two.go_on_from(one, saved)
    one.run(), two.run()
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_names_of_parameters_are_saved_and_need_not_be_there(named):
    one, two = (Problem(named=each) for each in named)
    one.run()
    two.go_on_from(one)
    one.run(), two.run()
    assert torch.equal(one.weight, two.weight)
    assert two.optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_names_are_those_of_messages():
    one = Problem(named=True)
    one.run(1)
    one.weight.data = one.weight.data.double()
    with pytest.raises(ValueError, match="params: weight is now"):
        one.run(1)
    with pytest.raises(TypeError, match="params: z of shape"):
        z = torch.ones(1, dtype=torch.complex64).requires_grad_()
        one.optimizer.add_param_group({"params": [("z", z)]})


@pytest.mark.parametrize("how", [pickle, copy])
def test_copies_have_all_public_attributes(how):
    one = Problem(momentum=0.5)
    one.run()
    twin = pickle.loads(pickle.dumps(one)) if how is pickle else copy.deepcopy(one)
    public = [{n for n in vars(o.optimizer) if n[0] != "_"} for o in (one, twin)]
    assert public[0] == public[1] and repr(one.optimizer) == repr(twin.optimizer)
    one.run(), twin.run()
    assert torch.equal(one.weight, twin.weight)


@pytest.mark.parametrize("scheduler", [StepLR, ReduceLROnPlateau])
def test_a_loop_that_evaluates_between_steps(scheduler):
    """As in torch's own tests: the closure is called outside of step as well."""
    one = Problem()
    options = {"step_size": 2} if scheduler is StepLR else {"patience": 0}
    schedule = scheduler(one.optimizer, **options)
    first = float(one.closure().detach())
    for _ in range(6):
        value = one.closure().detach()
        schedule.step(*([] if scheduler is StepLR else [value]))
        one.optimizer.step(one.closure)
    assert float(one.closure()) < first


def test_a_rate_in_a_tensor_is_the_number():
    one, two = Problem(), Problem()
    two.optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    one.run(), two.run()
    assert torch.equal(one.weight, two.weight)


def test_step_hooks_are_called_with_the_closure():
    one, seen = Problem(), []
    one.optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(args[1:]))
    one.optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    one.run(1)
    assert seen == [(one.closure,), "after"]


def test_duplicates_and_collections_without_order():
    p = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = exact([p, p], warmup_tol=1e-3)
    optimizer.step(lambda: p.square().sum())
    assert float(optimizer.lr) == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.ones(1))}})
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([p])
    assert len(optimizer.param_groups) == 1
    optimizer.step(lambda: p.square().sum())


def test_parameters_of_no_elements():
    empty, p = nn.Parameter(torch.ones(0, 3)), nn.Parameter(torch.ones(2))
    groups = [{"params": [empty]}, {"params": [p]}]
    optimizer = exact(groups, momentum=0.5, warmup_tol=1e-3)
    optimizer.step(lambda: p.square().sum() + empty.sum())
    assert float(optimizer.lr) == pytest.approx(0.5, rel=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: p.square().sum() + empty.sum())


def test_zero_grad_of_either_kind():
    one = Problem()
    one.run(1)
    one.optimizer.zero_grad(set_to_none=False)
    assert not one.weight.grad.any()
    one.run(1)
    one.optimizer.zero_grad()
    assert one.weight.grad is None


def test_weight_decay_and_rate_of_each_group():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 2.0}]
    optimizer = exact(groups, lr=0.25, warmup_tol=1e-6)
    optimizer.step(lambda: a.square().sum() + b.square().sum())
    rate = 1 / (2.0 + 2.0)
    assert float(1 - a[0].detach()) == pytest.approx(0.5 * rate * 2, rel=1e-2)
    assert float(1 - b[0].detach()) == pytest.approx(0.25 * rate * (2 + 2), rel=1e-2)
