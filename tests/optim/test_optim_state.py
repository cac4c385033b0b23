"""What LyapunovSGD saves: precision, hooks, copies and pickles."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nets import case
from optim_cases import exact, quadratic


def run(optimizer, closure, steps=4):
    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"k": 3}, {"k": 3, "momentum": 0.9}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_run_is_the_same_to_the_bit_and_nothing_is_demoted(options, dtype, tmp_path):
    options = {
        "gain": 0.1,
        "warmup_iterations": 3,
        "warmup_tol": 10.0,
        "perturbation": 0.2,
    } | options

    def start():
        truth = case("tanh_mlp", seed=4, dtype=dtype)
        return truth, exact(truth.model.parameters(), **options)

    truth, optimizer = start()
    run(optimizer, truth.closure)
    torch.save((truth.model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    resumed, other = start()
    model, saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.model.load_state_dict(model)
    other.load_state_dict(saved)
    for p in resumed.model.parameters():
        for value in other.state[p].values():
            assert value.dtype == torch.float32
    run(optimizer, truth.closure)
    run(other, resumed.closure)
    assert all(map(torch.equal, truth.model.parameters(), resumed.model.parameters()))
    assert torch.equal(optimizer.rates, other.rates)


def test_the_saved_state_is_a_copy():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], momentum=0.9)
    run(optimizer, closure)
    saved = optimizer.state_dict()
    buffer = saved["state"][0]["momentum_buffer"]
    assert buffer.untyped_storage().nbytes() == 2 * 8  # not all of the flat buffer
    before = buffer.clone()
    run(optimizer, closure)
    assert torch.equal(buffer, before)
    optimizer.load_state_dict(saved)
    run(optimizer, closure)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("k", [1, 2])
def test_copies_and_pickles_go_on_alike(how, k):
    truth = case("tanh_mlp", seed=2)
    optimizer = exact(truth.model.parameters(), k=k, gain=0.1, momentum=0.9, warmup_tol=1.0)
    run(optimizer, truth.closure)
    pair = (truth.model, optimizer)
    model, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.step(lambda: truth.model(x).square().sum())
        twin.step(lambda: model(x).square().sum())
    assert all(map(torch.equal, truth.model.parameters(), model.parameters()))
    assert torch.equal(twin.rates, optimizer.rates)


def test_hooks_see_the_whole_state():
    theta, closure = quadratic([4.0, 1.0])
    optimizer, seen = exact([theta]), []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(
        lambda o, d: seen.append("tracker" in d) or d | {"x": 1}
    )
    run(optimizer, closure)
    saved = optimizer.state_dict()
    assert seen == ["pre", True] and saved["x"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("x" in d))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(int(o.tracker.steps)))
    optimizer.load_state_dict(saved)
    assert seen[2:] == [True, int(optimizer.tracker.steps)]


@pytest.mark.parametrize("entry", [1, "text", torch.ones(2), [1, 2], None])
def test_entries_of_the_state_that_are_no_dictionaries(entry):
    """torch's own test_state_dict_pre_hook has one."""
    theta, closure = quadratic([4.0, 1.0])
    optimizer, other = exact([theta], momentum=0.5), exact([theta], momentum=0.5)
    run(optimizer, closure, 1)
    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", entry))
    saved = optimizer.state_dict()
    assert saved["state"]["test"] is not entry or not isinstance(entry, torch.Tensor)
    other.state["before"] = entry
    other.load_state_dict(saved)
    assert "before" not in other.state and type(other.state["test"]) is type(entry)
    run(other, closure)


def test_a_state_taken_back_into_the_same_optimizer_goes_on_alike():
    truth = case("tanh_mlp", seed=2)
    optimizer = exact(truth.model.parameters(), k=2, gain=0.1, momentum=0.9, warmup_tol=1.0)
    tracker, ends = optimizer.tracker, []
    run(optimizer, truth.closure)
    saved = copy.deepcopy((truth.model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        run(optimizer, truth.closure)
        ends.append([p.detach().clone() for p in truth.model.parameters()])
        truth.model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    assert all(map(torch.equal, *ends)) and optimizer.tracker is tracker


def test_groups_saved_before_the_bound_had_a_name_of_its_own():
    theta, closure = quadratic([-1.0, -2.0])
    optimizer = exact([theta], max_lr=0.5, warmup_iterations=5, estimate="growth")
    with pytest.warns(UserWarning, match="not stable"):
        run(optimizer, closure, 1)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["max_inverse_h"]
    other = exact([theta], max_lr=0.1, estimate="growth")
    other.load_state_dict(saved)
    other.step(closure)
    assert float(other.lr) == 0.5
    saved["param_groups"][0] |= {"max_lr": 7.0, "min_lr": 0.1, "initial_lr": 1.0}  # by OneCycleLR
    other = exact([theta], max_lr=0.1, estimate="growth")
    other.load_state_dict(saved)
    other.step(closure)
    assert float(other.lr) == 0.1


def test_a_capturable_rate_comes_back_as_a_tensor():
    theta, closure = quadratic([4.0, 1.0])
    optimizer, other = exact([theta], gain=0.5, capturable=True), exact([theta], capturable=True)
    run(optimizer, closure)
    other.load_state_dict(optimizer.state_dict())
    lr = other.param_groups[0]["lr"]
    assert float(lr) == 0.5 and lr.dtype == torch.float64
    assert lr is not optimizer.param_groups[0]["lr"]


def test_a_failed_load_restores_momentum():
    theta, closure = quadratic([4.0, 1.0])
    optimizer = exact([theta], momentum=0.9)
    run(optimizer, closure)
    held = optimizer.state[theta]["momentum_buffer"].clone()
    foreign = exact([nn.Parameter(torch.ones(3))], momentum=0.5)
    foreign.step(lambda: foreign.param_groups[0]["params"][0].square().sum())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(foreign.state_dict())
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert torch.equal(optimizer.state[theta]["momentum_buffer"], held)
    run(optimizer, closure)


def test_state_from_before_without_momentum_starts_it_at_zero():
    theta, closure = quadratic([4.0, 1.0])
    plain = exact([theta])
    run(plain, closure)
    optimizer = exact([theta], momentum=0.9)
    saved = plain.state_dict()
    saved["param_groups"][0]["momentum"] = 0.9
    optimizer.load_state_dict(saved)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.state[theta]["momentum_buffer"], theta.grad)
