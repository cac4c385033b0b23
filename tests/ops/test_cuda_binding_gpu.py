"""What only a GPU can show of the CUDA backend: streams, graphs, devices, models living there."""

import functools

import pytest
import torch

import lyapcuda
import nets
import simt_library
from lyapcuda import ops
from ops_cases import BF16, F32, F64, assert_same_bits, make_case
from panel_cases import make_panel_case

MISSING = simt_library.missing("cuda")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SIZES = [100003, 0, (33, 7), 4097, 1] + [k % 40 for k in range(simt_library.SEGMENTS + 20)]


def on(device, case):
    """A case with its tensors on that device (aligned: the views' storages stay behind)."""

    def to(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return [to(x) if isinstance(x, torch.Tensor) else x for x in value]

    return type(case)(*(to(value) for value in vars(case).values()))


def gpu_case(device="cuda", buffer=F32, storage=F32):
    return on(device, make_case(SIZES, buffer, storage, gap=16))


def gpu_panel_case(k, buffer=F32, storage=F32):
    return on("cuda", make_panel_case(k, SIZES, buffer, storage, gap=16, beta=0.01))


def two_steps(case, losses):
    """As a tracker takes them: q and d change places, so that a graph of two can be replayed."""
    for q, d in ((case.q, case.d), (case.d, case.q)):
        sums = ops.ascent_(d, q, case.g0, case.g1, case.offsets, case.state, theta=case.theta)
        ops.exponent_(case.state, sums, losses, ema=0.9)
        ops.recenter_(case.theta1, d, q, case.theta, case.offsets, case.state)
    ops.descend_(case.theta, case.g0, case.state, max_lr=1e-3)
    ops.stream_copy_(case.p, case.d)


def assert_same_case(a, b):
    torch.cuda.synchronize()
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert_same_bits(x.cpu(), y.cpu())


def panel_step(case, losses):
    """As a tracker of k separations takes it; then a Krylov step, on the rows of the panel."""
    ops.panel_recenter_(case.q, case.copies, case.d, case.theta, case.offsets, case.state)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    gram = ops.panel_ascent_(*step, theta=case.theta)
    ops.benettin_(case.state, gram, losses, case.k, realised=True)
    again = ops.panel_field(case.state, case.k, "again")
    transform = ops.panel_field(case.state, case.k, "transform")
    ops.combine_(case.d, case.d, transform, gate=again)
    ops.benettin_refine_(case.state, ops.gram(case.d, case.d, gate=again), case.k)
    ops.project_(case.p[0], case.q, transform[0])
    views = [case.copies[0, o : o + g.numel()] for o, g in zip(case.offsets, case.g0, strict=True)]
    ops.displace_(views, case.q[0], case.theta, case.offsets, losses[:1])
    ops.difference_(case.p_next[0], views, case.g0, case.offsets, losses[:1], keep=0.5)


STEPS = {
    "one separation": (gpu_case, two_steps),
    "panel": (lambda *dtypes: gpu_panel_case(14, *dtypes), panel_step),
}


#: More tiles than an H200 has room for at once, the next of which is on its way meanwhile.
LONG = [700003, 33]


@pytest.mark.parametrize(("buffer", "storage"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("k", [3, 14, 32])
def test_blocks_that_take_many_tiles_leave_what_the_cpu_does(k, buffer, storage):
    here = make_panel_case(k, LONG, buffer, storage, gap=16, beta=0.01)
    ops.panel_field(here.state, k, "pending").fill_(1.0)
    ops.panel_field(here.state, k, "transform").copy_(torch.randn(k, k, dtype=F64))
    there, coefficients = on("cuda", here), torch.randn(k, dtype=F64)

    def called(case):
        step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        ops.panel_recenter_(case.q, case.copies, case.d, case.theta, *step[4:])
        yield ops.panel_ascent_(*step)
        heavy = {"theta": case.theta, "momentum": 0.5, "p": case.p, "p_next": case.p_next}
        yield ops.panel_ascent_(*step, **heavy)
        yield ops.gram(case.d, case.d)
        yield ops.gram(case.d, case.q)
        transform = ops.panel_field(case.state, k, "transform")
        ops.combine_(case.d, case.d, transform.contiguous())
        yield ops.project_(case.p[0], case.q, coefficients.to(case.state.device))

    for actual, expected in zip(called(there), called(here), strict=True):
        largest = float(expected.abs().max())
        assert float((actual.cpu() - expected).abs().max()) <= 1e-12 * largest
    assert_same_case(there, here)


@pytest.mark.parametrize(("buffer", "storage"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("name", STEPS)
def test_a_graph_replayed_is_the_steps_taken_one_by_one(name, buffer, storage):
    make, step = STEPS[name]
    make = functools.partial(make, "cuda") if make is gpu_case else make
    eager, captured = make(buffer, storage), make(buffer, storage)
    losses = torch.ones(2, dtype=F64, device="cuda")
    for _ in range(6):
        step(eager, losses)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured, losses)  # what is loaded at a first call mustn't be within the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured, losses)
    for _ in range(5):
        graph.replay()
    assert_same_case(captured, eager)


def test_no_op_waits_for_the_device():
    losses = torch.ones(2, dtype=F64, device="cuda")
    steps = [(two_steps, gpu_case()), (panel_step, gpu_panel_case(5))]
    for step, case in steps:
        step(case, losses)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # a second or more of work before ours
    end = torch.cuda.Event()
    for step, case in steps:
        step(case, losses)
    end.record()
    assert not end.query()
    torch.cuda.synchronize()


def test_ops_run_on_the_current_stream():
    reference, case = gpu_case(), gpu_case()
    losses = torch.ones(2, dtype=F64, device="cuda")
    two_steps(reference, losses)
    torch.cuda.synchronize()
    g1 = [torch.full_like(g, float("nan")) for g in case.g1]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 28)  # on another stream, the ops would read NaN meanwhile
        for to, g in zip(g1, case.g1, strict=True):
            to.copy_(g)
        case.g1 = g1
        two_steps(case, losses)
    side.synchronize()
    assert_same_case(case, reference)


@pytest.mark.skipif(MISSING is not None or torch.cuda.device_count() < 2, reason="one GPU here")
def test_ops_run_where_their_tensors_are():
    first, second = gpu_case("cuda:0"), gpu_case("cuda:1")
    with torch.cuda.device(0):
        two_steps(first, torch.ones(2, dtype=F64, device="cuda:0"))
        two_steps(second, torch.ones(2, dtype=F64, device="cuda:1"))
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_same_case(first, second)
    mixed = gpu_case("cuda:0")
    mixed.state = mixed.state.to("cuda:1")
    with pytest.raises(RuntimeError, match="state: expected a tensor on cuda:0, got one on cuda:1"):
        two_steps(mixed, torch.ones(2, dtype=F64, device="cuda:0"))


def net_on(device, name, dtype=F64):
    """(closure, parameters) of a net of tests/support/nets.py."""
    model = nets.case(name, 1, dtype).model.to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (32, 1, 8, 8) if name == "conv" else (32, 10)
    x = torch.randn(shape, generator=generator, dtype=F64).to(device, dtype)
    labels = torch.randint(0, 4, (32,), generator=generator).to(device)

    def closure():
        return torch.nn.functional.cross_entropy(model(x).double(), labels)

    return closure, list(model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"which": "SA"}, {"estimate": "growth", "momentum": 0.5}], ids=str
)
@pytest.mark.parametrize("name", ["gelu_mlp", "conv"])
def test_a_model_on_the_gpu_measures_what_it_does_on_the_cpu(name, options):
    values, saved = [], None
    for device in ("cpu", "cuda"):
        closure, parameters = net_on(device, name)
        tracker = lyapcuda.CurvatureTracker(parameters, **options)
        if saved is None:  # each device draws another first q: both go on from the CPU's
            tracker.step(closure)
            saved = tracker.state_dict()
        else:
            tracker.load_state_dict(saved)
        for _ in range(15):
            tracker.step(closure)
        assert tracker.h.device.type == device and all(p.grad is None for p in parameters)
        assert float(tracker.steps) == 16
        values.append([float(tracker.h), float(tracker.beta), *tracker.interval.tolist()])
    torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_tracker_of_less_precision_runs_on_the_gpu(dtype):
    closure, parameters = net_on("cuda", "gelu_mlp", dtype)
    before = [p.detach().clone() for p in parameters]
    tracker = lyapcuda.CurvatureTracker(parameters)
    for _ in range(30):
        tracker.step(closure)
    assert tracker.h.isfinite() and float(tracker.skipped) == 0
    for now, then in zip(parameters, before, strict=True):
        assert_same_bits(now.detach().cpu(), then.cpu())


def test_the_optimizer_trains_a_model_on_the_gpu():
    closure, parameters = net_on("cuda", "gelu_mlp", F32)
    optimizer = lyapcuda.LyapunovSGD(parameters, max_lr=1.0)
    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert losses[-1] < losses[0] and optimizer.lr.is_cuda and 0 < float(optimizer.lr) <= 1


def test_a_saved_tracker_goes_on_to_the_bit():
    closure, parameters = net_on("cuda", "gelu_mlp", F32)
    first = lyapcuda.CurvatureTracker(parameters)
    for _ in range(5):
        first.step(closure)
    second = lyapcuda.CurvatureTracker(parameters)
    second.load_state_dict(first.state_dict())
    for tracker in (first, second):
        tracker.step(closure)
    assert_same_bits(first.state.cpu(), second.state.cpu())


def calls():
    case, panel = gpu_case(), gpu_panel_case(3)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    sums = torch.tensor([1.5, 1.0, 0.5, 1.0, 1.0, 0.5], dtype=F64, device="cuda")
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    losses = torch.ones(2, dtype=F64, device="cuda")
    square = torch.eye(6, dtype=F64, device="cuda")
    small = square[:3, :3].contiguous()
    newton = (panel.theta, panel.g0, panel.offsets, panel.d, panel.state)
    heavy = {"momentum": 0.9, "nesterov": True, "buffer": panel.p[0], "factor": losses[:1]}
    panels = (panel.d, panel.q, panel.g0, panel.g1, panel.offsets, panel.state)
    kept = {"keep": 0.5}
    return {
        "ascent_": (step, moved),
        "exponent_": ((case.state, sums, losses), {}),
        "secant_": ((case.state, sums), {}),
        "recenter_": (
            (case.theta1, case.q, case.p, case.theta, case.offsets, case.state),
            {"p": case.d, "p_previous": case.p_next},
        ),
        "descend_": (
            (case.theta, case.g0, case.state),
            {"momentum": 0.9, "buffer": case.p, "offsets": case.offsets, "factor": losses[:1]},
        ),
        "stream_copy_": ((case.d, case.q), {}),
        "displace_": ((case.theta1, case.q, case.theta, case.offsets, losses[:1]), {}),
        "difference_": ((case.d, case.g0, case.g1, case.offsets, losses[:1]), kept),
        "panel_ascent_": (panels, {"theta": panel.theta}),
        "panel_recenter_": (
            (panel.q, panel.copies, panel.d, panel.theta, panel.offsets, panel.state),
            {},
        ),
        "benettin_": ((panel.state, square, losses, 3), {}),
        "benettin_refine_": ((panel.state, small, 3), {}),
        "gram": ((panel.q, panel.d), {"gate": losses[:1]}),
        "combine_": ((panel.q, panel.d, small), {}),
        "reseed_": (
            (panel.q, panel.offsets, [t.numel() for t in panel.theta], panel.state),
            {"elements": 10, "p": panel.p},
        ),
        "project_": ((panel.p[0].clone(), panel.q, small[0].contiguous()), {}),
        "panel_slopes_": (newton, heavy),
        "panel_descend_": ((*newton, small[0].contiguous()), heavy),
    }


NAMES = sorted(
    name.split("::")[1]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("lyapcuda::")
)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    args, kwargs = calls()[name]
    torch.library.opcheck(getattr(torch.ops.lyapcuda, name).default, args, kwargs)
