"""Faults in what is tracked: which parameters, of which kind, and what becomes of them mid-run."""

import pytest
import torch
from torch import nn

import lyapcuda
import nets
import simt_library
from fault_cases import bits, bowl, curvatures, found, steps, surroundings

F64 = torch.float64
NO_GPU = simt_library.missing("cuda")
gpu = pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))


# --- which ---------------------------------------------------------------------------------------


def test_plain_tensors_are_tracked_like_parameters(backend):
    """A list of leaves, in no module: the values of the same numbers as nn.Parameter."""
    seen = []
    for kind in (lambda t: t.requires_grad_(), nn.Parameter):
        theta = kind(torch.ones(6, dtype=F64))
        h = torch.tensor(curvatures(1), dtype=F64)
        tracker = lyapcuda.CurvatureTracker([theta])
        steps(tracker, lambda h=h, theta=theta: 0.5 * (h * theta * theta).sum(), 12)
        seen.append(bits(tracker.state))
        assert found(tracker) == pytest.approx([5.0], rel=1e-3)
    assert seen[0] == seen[1]


def test_a_duplicate_within_a_group_counts_once():
    theta, closure = bowl()
    seen = []
    for params in ([theta], [theta, theta], [{"params": [theta, theta]}], [("a", theta)] * 2):
        tracker = lyapcuda.CurvatureTracker(params, weight_decay=0.5)
        steps(tracker, closure, 15)
        assert len(tracker.parameters) == 1
        assert found(tracker) == pytest.approx([5.5], rel=1e-3)
        seen.append(bits(tracker.state))
    assert seen == seen[:1] * 4


def test_a_duplicate_across_groups_is_named():
    theta, _ = bowl()
    groups = [{"params": [("w", theta)], "weight_decay": 1.0}, {"params": [("w", theta)]}]
    with pytest.raises(ValueError, match="params: w appears in more than one group"):
        lyapcuda.CurvatureTracker(groups)
    with pytest.raises(ValueError, match="w appears in more than one group"):
        lyapcuda.eigsh(lambda: theta.sum(), groups)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):  # torch's own
        lyapcuda.LyapunovSGD([{"params": [theta]}, {"params": [theta]}])


@pytest.mark.parametrize("name", ["beta", "perturbation"])
def test_a_rate_or_size_that_the_buffers_cannot_hold_is_named(name):
    wide, narrow = (nn.Parameter(torch.ones(3, dtype=t)) for t in (F64, torch.bfloat16))
    for params in ([narrow], [wide, narrow]):
        with pytest.raises(ValueError, match=f"{name}=1e[+]39: above 3.403e[+]38"):
            lyapcuda.CurvatureTracker(params, **{name: 1e39})
    lyapcuda.CurvatureTracker([wide], **{name: 1e39})
    with pytest.raises(ValueError, match=f"{name}=<Tensor of shape ..>: expected a positive"):
        lyapcuda.CurvatureTracker([wide], **{name: torch.tensor(0.1)})


# --- of which kind -------------------------------------------------------------------------------


def pieces(shift):
    """Parameters of every awkward kind over one vector of six numbers, each at `shift` in memory:
    0-dim, empty, transposed, with gaps, misaligned. Returns (parameters, their numbers in order).
    """
    memory = torch.ones(64, dtype=torch.float32)
    scalar = nn.Parameter(memory[shift])
    empty = nn.Parameter(torch.empty(0, 3))
    transposed = nn.Parameter(memory[8 + shift : 12 + shift].view(2, 2).T)
    gaps = nn.Parameter(memory[20 + shift : 23 + shift : 2])
    return [scalar, empty, transposed, gaps], lambda: torch.cat(
        [scalar.reshape(1), empty.reshape(-1), transposed.reshape(-1), gaps[:1]]
    )


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("k", [1, 3])
def test_empty_scalar_strided_and_misaligned_parameters(backend, k, shift):
    parameters, numbers = pieces(shift)
    before = surroundings(parameters)
    strides = [p.stride() for p in parameters]
    tracker = lyapcuda.CurvatureTracker(parameters, k=k)
    h = torch.tensor(curvatures(k))
    steps(tracker, lambda: 0.5 * (h * numbers().square()).sum(), 15)
    assert found(tracker) == pytest.approx(curvatures(k)[:k], rel=1e-2)
    assert surroundings(parameters) == before and [p.stride() for p in parameters] == strides
    vectors = tracker.vector(0)
    assert [v.shape for v in vectors] == [p.shape for p in parameters]
    assert abs(float(vectors[0])) == pytest.approx(tracker.perturbation, rel=0.05)


@pytest.mark.parametrize("k", [1, 2])
def test_one_number_of_each_dtype(backend, k):
    """Groups of float64, float32, bfloat16 and float16 in one tracker: one Hessian."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    parameters = [nn.Parameter(torch.ones((), dtype=dtype)) for dtype in dtypes]
    weights = curvatures(k, 4)

    def closure():
        terms = zip(weights, parameters, strict=True)
        return sum((0.5 * w * p.double().square() for w, p in terms), torch.zeros((), dtype=F64))

    before = surroundings(parameters)
    tracker = lyapcuda.CurvatureTracker(parameters, k=k)
    steps(tracker, closure, 12)
    assert float(tracker.skipped) == 0 and surroundings(parameters) == before
    assert found(tracker) == pytest.approx(weights[:k], rel=0.05)


@gpu
def test_parameters_on_two_devices():
    here, there = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))
    h = torch.tensor([5.0, 2.0, 1.0])
    tracker = lyapcuda.CurvatureTracker([here, there], k=2)

    def closure():
        return (h * here.square()).sum() / 2 + (3 * there.square()).sum().cpu() / 2

    steps(tracker, closure, 100)
    assert tracker.h.tolist() == pytest.approx([5.0, 3.0], rel=1e-2)


def test_weights_tied_across_modules_are_one_parameter(backend):
    encoder, decoder = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    decoder.weight = encoder.weight
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    tracker = lyapcuda.CurvatureTracker([*encoder.parameters(), *decoder.parameters()])
    once = lyapcuda.CurvatureTracker(encoder.parameters())
    for t in (tracker, once):
        steps(t, lambda: (encoder(x) + decoder(x)).square().mean(), 5)
    assert encoder.weight is decoder.weight and bits(tracker.state) == bits(once.state)


# --- mid-run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_freezing_mid_run_measures_what_is_left(backend, k):
    """A frozen parameter counts as flat, is not moved, and gets no gradient."""
    sharp, rest = (nn.Parameter(torch.full((6,), 0.1, dtype=F64)) for _ in range(2))
    h = torch.tensor(curvatures(k), dtype=F64)

    def closure():
        return 0.5 * (1.2 * h * sharp * sharp + h * rest * rest).sum()

    optimizer = torch.optim.SGD([sharp, rest], lr=0.01)
    tracker = lyapcuda.CurvatureTracker([sharp, rest], k=k)
    steps(tracker, closure, 12)
    assert found(tracker) == pytest.approx([6.0, 5.4][:k], rel=0.05)
    sharp.requires_grad_(False)
    frozen = sharp.detach().clone()
    for _ in range(22):
        tracker.step(closure, leave_grad=True)
        assert sharp.grad is None and rest.grad is not None
        optimizer.step()
    assert torch.equal(sharp, frozen) and float(tracker.skipped) == 0
    assert found(tracker) == pytest.approx(curvatures(k)[:k], rel=1e-2)
    assert len(lyapcuda.CurvatureTracker([sharp, rest]).parameters) == 1
    sharp.requires_grad_(True)  # and thaws again
    steps(tracker, closure, 3)
    assert float(tracker.skipped) == 0


def test_a_group_added_to_an_attached_optimizer_gets_its_gradient_once(backend):
    """As does a parameter that is in no module: closures that call backward() accumulate."""
    tracked, beside, late = (nn.Parameter(torch.ones(3, dtype=F64)) for _ in range(3))
    optimizer = torch.optim.SGD([tracked, beside], lr=0.1)
    tracker = lyapcuda.CurvatureTracker([tracked], k=2)
    tracker.attach(optimizer)

    def closure():
        loss = (tracked.square() + 2 * beside.square() + 3 * late.square()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert beside.grad.tolist() == [4.0] * 3
    optimizer.add_param_group({"params": [late]})
    optimizer.zero_grad()
    late.grad = torch.ones_like(late)
    value = beside.detach().clone()
    optimizer.step(closure)
    torch.testing.assert_close(beside.grad, 4 * value)
    assert late.grad.tolist() == [7.0] * 3  # its own 1, and 6 once
    assert float(tracker.steps) == 2


def test_two_trackers_on_one_model_measure_what_each_does_alone(backend):
    case = nets.case("gelu_mlp", 2, F64)
    parameters = list(case.model.parameters())

    def run(*kinds):
        trackers = [lyapcuda.CurvatureTracker(parameters, **kind) for kind in kinds]
        for _ in range(4):
            for tracker in trackers:
                tracker.step(case.closure)
        return [bits(tracker.state) for tracker in trackers]

    before = surroundings(parameters, [case.model])
    kinds = [{}, {"which": "SA", "seed": 1}, {"k": 2, "momentum": 0.5}]
    assert run(*kinds) == [run(kind)[0] for kind in kinds]
    assert surroundings(parameters, [case.model]) == before


def test_two_trackers_attached_to_one_optimizer(backend):
    theta, closure = bowl([5.0, 0.2, 0.1, -0.1, -4.0])
    optimizer = torch.optim.SGD([theta], lr=0.0)
    high = lyapcuda.CurvatureTracker([theta])
    low = lyapcuda.CurvatureTracker([theta], which="SA")
    for tracker in (high, low):
        tracker.attach(optimizer)
    for _ in range(15):
        optimizer.step(closure)
    assert found(high) == pytest.approx([5.0], rel=1e-2)
    assert found(low) == pytest.approx([-4.0], rel=1e-2)
    assert int(high.steps) == int(low.steps) == 15
