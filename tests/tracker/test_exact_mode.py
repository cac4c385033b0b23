"""CurvatureTracker(mode="exact"): products by double backward, out of the training gradient."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lyapcuda
from classifiers import classifier, mlp
from fault_cases import bits, bowl, state_of, surroundings
from lyapcuda.objective.double_backward import DoubleBackwardError
from nets import Square, case, quadratic
from noisy import Noisy, snapshot

Tracker = partial(lyapcuda.CurvatureTracker, mode="exact")
SPECTRUM = [8.0, 4.0, 2.0, 0.4, 0.2, -0.1, -1.0, -3.0]


def measured(tracker, closure, steps):
    for _ in range(steps):
        tracker.step(closure)
    return tracker


# --- values --------------------------------------------------------------------------------------


def test_on_kinks_it_is_the_hessian_at_theta_where_differences_are_at_another_scale():
    truth = classifier(lambda: mlp(F.relu))
    exact, other = (
        measured(make(truth.model.parameters(), estimate="schwarz"), truth.closure, 40)
        for make in (Tracker, lyapcuda.CurvatureTracker)
    )
    assert float(exact.h) == pytest.approx(truth.h0, rel=1e-4)
    assert exact.interval[0] <= truth.h0 <= exact.interval[1]
    assert abs(float(other.h) / truth.h0 - 1) > 0.01


@pytest.mark.parametrize(
    ("which", "k", "momentum"),
    [("LA", 1, 0.0), ("SA", 1, 0.0), ("LA", 3, 0.5), ("SA", 2, 0.0), ("BE", 5, 0.0)],
)
def test_both_ends_any_k_and_momentum(which, k, momentum):
    theta, closure, _ = quadratic(SPECTRUM, seed=1)
    tracker = measured(Tracker([theta], k, which=which, momentum=momentum), closure, 60)
    ends = {"LA": SPECTRUM[:k], "SA": SPECTRUM[::-1][:k], "BE": [*SPECTRUM[:3], *SPECTRUM[-2:]]}
    expected = torch.tensor(ends[which], dtype=torch.float64)
    torch.testing.assert_close(tracker.h.reshape(-1), expected, rtol=1e-6, atol=0)
    assert int(tracker.skipped.sum()) == 0


@pytest.mark.parametrize("estimate", ["rayleigh", "schwarz", "growth", "paper"])
def test_every_estimate_and_weight_decay(estimate):
    theta, closure, _ = quadratic(SPECTRUM, seed=1)
    groups = [{"params": [theta], "weight_decay": 0.5}]
    tracker = measured(Tracker(groups, estimate=estimate), closure, 60)
    expected = 8.5 / (torch.e - 1) if estimate == "paper" else 8.5
    assert float(tracker.h) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [None, 1e-12, 1e6])
def test_the_perturbation_is_a_norm_and_no_distance(size):
    truth = case("tanh_mlp", seed=1)
    tracker = measured(Tracker(truth.model.parameters(), 2, perturbation=size), truth.closure, 40)
    assert float(tracker.h[0]) == pytest.approx(truth.h0, rel=1e-3)
    assert tracker.perturbation == (size or 1.0)
    norm = sum(float(part.double().square().sum()) for part in tracker.vector()) ** 0.5
    assert norm == pytest.approx(tracker.perturbation, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float16, 1)]
)
def test_16_bit_parameters(dtype, k):
    truth = case("conv", seed=1, dtype=dtype)
    tracker = measured(Tracker(truth.model.parameters(), k, weight_decay=0.1), truth.closure, 25)
    expected = truth.eigenvalues.flip(0)[:k] + 0.1
    torch.testing.assert_close(tracker.h.reshape(-1), expected, rtol=0.02, atol=0)


def test_parameters_of_several_types_and_one_without_a_gradient():
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    unused, linear = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))
    loss = lambda: a.double().square().sum() + 2 * b.square().sum() + linear  # noqa: E731
    tracker = measured(Tracker([a, b, unused, linear], 2), loss, 40)
    assert tracker.h.tolist() == pytest.approx([4.0, 4.0], rel=1e-6)
    assert float(measured(Tracker([linear]), loss, 3).h) == 0.0


def test_the_closure_is_called_once():
    theta, loss = bowl()
    calls = []
    measured(Tracker([theta], 3, debug=False), lambda: calls.append(0) or loss(), 4)
    assert len(calls) == 4


# --- training ------------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.out(self.layer(self.embed(x))).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
        self.first, self.last = nn.Sequential(*layers), nn.Linear(216, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


def convolutions(norm: nn.Module, act: nn.Module) -> nn.Module:
    first = [nn.Conv2d(3, 6, 3, bias=False), norm, act, nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(54, 4)).to(
        memory_format=torch.channels_last
    )


def image() -> Tensor:
    return torch.randn(16, 3, 8, 8)


#: Name → model, inputs; the last three compute another gradient while autograd records it.
NETS = {
    "mlp": (lambda: mlp(F.relu).float(), lambda: torch.randn(16, 8)),
    "batch-norm": (lambda: convolutions(nn.BatchNorm2d(6), nn.ReLU()), image),
    "transformer": (Text, lambda: torch.randint(0, 20, (16, 7))),
    "checkpoint": (Checkpointed, image),
    "group-norm": (lambda: convolutions(nn.GroupNorm(2, 6), nn.ReLU()), image),
    "silu": (lambda: convolutions(nn.BatchNorm2d(6), nn.SiLU()), image),
    "gru": (Recurrent, lambda: torch.randn(16, 5, 6)),
}


@pytest.mark.parametrize("tracked", ["all", "some"])
@pytest.mark.parametrize("name", NETS)
def test_training_is_bitwise_what_it_is_without(name, tracked):
    """AdamW with clipping; gradients, buffers and random states."""
    make, draw = NETS[name]
    torch.manual_seed(0)
    start, batches = make(), [draw() for _ in range(5)]
    labels = torch.arange(16) % 4

    def train(k: int) -> list:
        model, seen = copy.deepcopy(start), []
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        parameters = list(model.parameters())[tracked == "some" :]
        tracker = Tracker(parameters, k) if k else None
        for number, x in enumerate(batches):
            closure = lambda x=x: F.cross_entropy(model(x), labels)  # noqa: E731
            if number != 2:  # the third adds up
                optimizer.zero_grad()
            if tracker is None:
                loss = closure()
                loss.backward()
            else:
                loss = tracker.backward(closure)
            seen += [bits(loss), bits([p.grad for p in model.parameters()])]
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        strides = [p.grad.stride() for p in model.parameters()]
        return [*seen, strides, surroundings(model.parameters(), [model])[0], torch.rand(2)]

    assert bits(train(1 if tracked == "all" else 2)) == bits(train(0))


def test_step_leaves_no_trace():
    torch.manual_seed(0)
    model = Noisy()
    x, labels = torch.randn(32, 6), torch.randint(0, 3, (32,))
    F.cross_entropy(model(x), labels).backward()
    before = snapshot(model)
    tracker = Tracker(model.parameters(), 2)
    for _ in range(5):
        tracker.step(lambda: F.cross_entropy(model(x), labels))
    assert snapshot(model) == before and int(tracker.steps) == 5


def test_gradients_are_copies_that_no_graph_holds():
    truth = case("tanh_mlp", seed=1)
    tracker = measured(Tracker(truth.model.parameters()), truth.closure, 4)
    tracker.backward(truth.closure)
    assert all(p.grad.grad_fn is None and not p.grad.requires_grad for p in tracker.parameters)
    theta = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    tracker = Tracker(theta)
    for _ in range(5):
        theta[0].grad = theta[1].grad = None
        tracker.backward(lambda: theta[0].sum() + theta[1].sum())
    theta[0].grad.mul_(3)  # of an expanded one both would be this memory
    assert [t.grad.tolist() for t in theta] == [[3.0, 3.0], [1.0, 1.0]]


@pytest.mark.parametrize("part_of", ["measure", "batches"])
def test_of_a_part_of_the_minibatch(part_of):
    model = case("gelu_mlp", seed=2).model
    x, labels = torch.randn(40, 10), torch.randint(0, 4, (40,))
    loss_of = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    rest, part = lyapcuda.split_batch((x, labels), 0.3)

    def gradient(tracker):
        model.zero_grad()
        if part_of == "measure":
            tracker.backward(lambda: loss_of((x, labels)), measure=lambda: loss_of(part))
        else:
            tracker.backward(loss_of, batches=[rest, part])
        return bits([p.grad for p in model.parameters()])

    exact, other = Tracker(model.parameters()), lyapcuda.CurvatureTracker(model.parameters())
    for _ in range(15):
        assert gradient(exact) == gradient(other)
    alone = measured(Tracker(model.parameters()), lambda: loss_of(part), 15)
    assert torch.equal(exact.h, alone.h)
    assert float(exact.h) == pytest.approx(float(other.h), rel=0.02)


def test_steps_that_are_not_due_are_plain():
    truth = case("tanh_mlp", seed=1)
    tracker = Tracker(truth.model.parameters(), every=2)
    tracker.step(truth.closure, leave_grad=True)

    def own_backward():
        loss = truth.closure()
        loss.backward()
        return loss

    assert tracker.step(own_backward, leave_grad=True) is not None
    with pytest.raises(DoubleBackwardError, match="backward"):
        tracker.step(own_backward, leave_grad=True)


def test_attached_to_an_optimizer():
    truth = case("tanh_mlp", seed=1)
    twin = copy.deepcopy(truth.model)
    x = torch.randn(8, 6)

    def train(model, watch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tracker = Tracker(model.parameters(), debug=False)
        if watch:
            tracker.attach(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if not watch:
                loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        return tracker, bits(list(model.parameters()))

    assert train(truth.model, True)[1] == train(twin, False)[1]


def test_debug_finds_another_function():
    theta = nn.Parameter(torch.ones(3))
    numbers = iter(range(100))
    with pytest.raises(RuntimeError, match="closure: two evaluations at the same θ"):
        Tracker([theta], debug=True).step(lambda: (theta * next(numbers)).square().sum())
    tracker = measured(Tracker([theta], debug=True), lambda: theta.square().sum(), 4)
    assert float(tracker.h) == pytest.approx(2.0)


# --- refused -------------------------------------------------------------------------------------


def own_backward(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


def number(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return float(loss)


def fused_attention(model, x):
    y = model(x)[None, None]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(y, y, y).square().mean()


def reentrant(model, x):
    return checkpoint(model, x.requires_grad_(), use_reentrant=True).square().mean()


def weight_normed(model, x):
    return parametrizations.weight_norm(copy.deepcopy(model))(model(x)).square().mean()


def hooked(model, x):
    model.weight.register_hook(lambda g: 2 * g)
    return model(x).square().mean()


def hooked_afterwards(model, x):
    model.bias.register_post_accumulate_grad_hook(lambda p: None)
    return model(x).square().mean()


REFUSED = {
    own_backward: "closure: it called backward",
    number: "closure: it called backward",
    lambda model, x: 1.0: "closure: the loss it returned can't be differentiated",
    fused_attention: "can't be differentiated twice.*scaled_dot_product.*mode='difference'",
    lambda model, x: Square.apply(model(x)).mean(): "double backward of SquareBackward, a custom",
    reentrant: "double backward of CheckpointFunction.* is wrong in torch, or missing",
    weight_normed: "double backward of WeightNormInterface.* is wrong",
    hooked: "mode='exact': weight has hooks",
    hooked_afterwards: "mode='exact': bias has hooks",
}


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("loss_of", REFUSED)
def test_what_is_refused_leaves_everything_as_it_was(loss_of, leave):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(16, 4)
    plain = lambda: model(x).square().mean()  # noqa: E731
    tracker = Tracker(model.named_parameters(), 2)
    measured(tracker, plain, 4)
    plain().backward()
    before = surroundings(model.parameters(), [model]), state_of(tracker)
    with pytest.raises(DoubleBackwardError, match=REFUSED[loss_of]):
        tracker.step(lambda: loss_of(model, x.clone()), leave_grad=leave)
    assert (surroundings(model.parameters(), [model]), state_of(tracker)) == before
    for parameter in model.parameters():
        parameter._backward_hooks, parameter._post_accumulate_grad_hooks = None, None
    tracker.step(plain)
    assert int(tracker.steps) == 5


def test_replicas_are_refused(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(3, 2))
        tracker = Tracker(model.parameters())
        with pytest.raises(NotImplementedError, match="mode='exact': DistributedDataParallel"):
            tracker.step(lambda: model(torch.ones(2, 3)).sum())
        with pytest.raises(NotImplementedError, match="mode='exact'"):
            Tracker([nn.Parameter(torch.ones(2))], process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_bad_arguments():
    theta = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="mode='central'.*exact"):
        lyapcuda.CurvatureTracker([theta], mode="central")
    with pytest.raises(ValueError, match="none of the tracked parameters"):
        Tracker([theta]).step(lambda: torch.ones((), requires_grad=True) * 2)
    sparse = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(TypeError, match="only dense"):
        Tracker(sparse.parameters()).step(lambda: sparse(torch.tensor([1])).square().sum())
    assert theta.grad is None and sparse.weight.grad is None


def test_a_product_that_is_not_finite_is_left_out():
    theta = nn.Parameter(torch.tensor([4.0, 1.0], dtype=torch.float64))
    tracker = measured(Tracker([theta]), lambda: theta.square().sum(), 5)
    h = float(tracker.h)
    tracker.step(lambda: (theta - torch.tensor([4.0, 0.0])).abs().pow(1.5).sum())
    assert float(tracker.h) == h and int(tracker.skipped) == 1


# --- saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_a_saved_state_goes_on_bitwise_and_tells_its_mode(k):
    truth = case("tanh_mlp", seed=1)
    tracker = measured(Tracker(truth.model.parameters(), k), truth.closure, 5)
    other = Tracker(truth.model.parameters(), k)
    other.load_state_dict(tracker.state_dict())
    for each in (tracker, other):
        measured(each, truth.closure, 5)
    assert torch.equal(tracker.h, other.h)
    with pytest.raises(ValueError, match="mode is 'exact', but this tracker's is 'difference'"):
        lyapcuda.CurvatureTracker(truth.model.parameters(), k).load_state_dict(other.state_dict())
