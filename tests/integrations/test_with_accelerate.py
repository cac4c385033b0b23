"""`backward` in a loop of Accelerate: its gradients to the bit, and the loss's own h."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

import lyapcuda
from lyapcuda.integrations.accelerate import backward
from lyapcuda.integrations.watched import readings

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(1))


def trained(watched, parts=1, precision="no", clip=None, lr=0.1, epochs=2, folder=None):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision
    )
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 3))
    if lr == 0.0:
        model[2].p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    tracker = lyapcuda.CurvatureTracker(model.parameters(), optimizer=optimizer)
    if folder is not None:
        accelerator.register_for_checkpointing(tracker)
    losses = []
    for _ in range(epochs):
        for x, y in loader:

            def loss_of(x=x, y=y):
                return nn.functional.cross_entropy(model(x), y)

            with accelerator.accumulate(model):
                if watched:
                    loss = backward(accelerator, tracker, loss_of)
                else:
                    loss = loss_of()
                    accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    left = [p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()]
    return accelerator, tracker, model, left, losses


CASES = {
    "plain": {},
    "accumulation": {"parts": 4},
    "clipped": {"clip": 0.1},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_bitwise_what_it_was(case):
    *_, before, losses = trained(False, **CASES[case])
    _, tracker, _, after, again = trained(True, **CASES[case])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert losses == again
    assert int(tracker.steps) == (2 if case == "accumulation" else 8)
    assert set(readings(tracker)) == {f"curvature/{n}" for n in ("h", "h_low", "h_high", "edge")}


@pytest.mark.parametrize("case", ["plain", "accumulation", "clipped"])
def test_h_is_the_losses_own_largest_eigenvalue(case):
    _, tracker, model, *_ = trained(True, lr=0.0, epochs=60, **CASES[case])
    x, y = X[-16:], Y[-16:]  # the last micro-batch
    true = lyapcuda.eigsh(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    rel = 0.01 if case == "accumulation" else 0.3  # elsewhere it is another batch at each step
    assert float(tracker.h) == pytest.approx(float(true.eigenvalues[0]), rel=rel)


def test_accelerates_checkpoints_hold_the_tracker(tmp_path):
    accelerator, tracker, *_ = trained(True, folder=tmp_path)
    accelerator.save_state(str(tmp_path / "state"))
    h, calls = tracker.h.clone(), tracker.calls
    tracker.step(lambda: sum(p.square().sum() for p in tracker.parameters))
    assert not torch.equal(tracker.h, h)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(tracker.h, h) and tracker.calls == calls


def test_an_exception_of_the_closure_leaves_everything_as_it_was():
    accelerator, tracker, model, *_ = trained(True)
    backward(accelerator, tracker, lambda: nn.functional.cross_entropy(model(X), Y))
    grads = [p.grad.clone() for p in model.parameters()]
    h, calls, random = tracker.h.clone(), tracker.calls, torch.get_rng_state()

    def raising():
        model(X)  # has drawn a dropout mask
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        backward(accelerator, tracker, raising)
    assert torch.equal(tracker.h, h) and tracker.calls == calls
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_bad_arguments_are_named():
    accelerator, tracker, *_ = trained(False)
    with pytest.raises(TypeError, match="accelerator=3"):
        backward(3, tracker, lambda: None)
    with pytest.raises(TypeError, match="tracker=<Accelerator>"):
        backward(accelerator, accelerator, lambda: None)
