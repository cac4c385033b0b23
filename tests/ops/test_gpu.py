"""What only a GPU can show of the CUDA backend: streams, graphs, devices, models living there."""

import pytest
import torch

import lyapcuda
import nets
import simt_library
import weighted_losses
from lyapcuda import ops
from op_inputs import BF16, F32, F64, assert_same_bits, at, tensors_of
from op_table import ROWS, TABLE

MISSING = simt_library.missing("cuda")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

SIZES = [100003, 0, (33, 7), 4097, 1] + [k % 40 for k in range(simt_library.SEGMENTS + 20)]
#: More tiles than an H200 has room for at once, the next of which is on its way meanwhile.
LONG = [700003, 33]
COUNTS = [1, 14]


def on(device, value):
    """Arguments there (aligned: the views' storages stay behind)."""
    if isinstance(value, dict):
        return {name: on(device, item) for name, item in value.items()}
    if isinstance(value, list):
        return [on(device, item) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def step_arguments(device, k, buffer=F32, storage=F32, sizes=SIZES):
    """Of all the ops of a step, by name."""
    row = TABLE["ascent_"]
    inputs = row.inputs(sizes, k, buffer, storage, gap=16)
    a = row.draw(inputs, realised=True, heavy=True, beta=0.01)
    a |= {"copies": inputs.panel(dtype=storage), "buffer": inputs.flat(), "v": inputs.flat()}
    a |= {"losses": torch.ones(2, dtype=F64), "coefficients": inputs.matrix(k, 1)[:, 0].clone()}
    return on(device, a)


def take_step(a):
    """As a tracker of k separations takes it, then a step of the optimizer and a Krylov step."""
    k, state, offsets = len(a["q"]), a["state"], a["offsets"]
    where = (a["theta"], offsets, state)
    again, transform = (ops.state_field(state, k, name) for name in ("again", "transform"))
    heavy = {"p": a["p"], "p_next": a["p_next"]}
    ops.recenter_(a["q"], a["copies"], a["d"], *where, **heavy)
    step = (a["d"], a["q"], a["g0"], a["g1"], offsets, state)
    gram = ops.ascent_(*step, theta=a["theta"], momentum=0.5, **heavy)
    ops.benettin_(state, gram, a["losses"], k, realised=True, momentum=0.5)
    ops.combine_(a["d"], a["d"], transform, gate=again)
    ops.benettin_refine_(state, ops.gram(a["d"], a["d"], gate=again), k)
    sizes = [t.numel() for t in a["theta"]]
    ops.reseed_(a["d"], offsets, sizes, state, elements=sum(sizes), p=a["p_next"])
    along = {"momentum": 0.9, "buffer": a["buffer"]}
    slopes = ops.slopes_(a["theta"], a["g0"], offsets, a["d"], state, **along)
    along |= {"panel": a["d"], "slopes": slopes, "offsets": offsets, "max_lr": 1e-3}
    ops.descend_(a["theta"], a["g0"], state, **along)
    ops.project_(a["v"], a["q"], a["coefficients"])
    views = at(a["copies"][0], a["theta"], offsets)
    ops.displace_(views, a["q"][0], a["theta"], offsets, a["losses"][:1])
    ops.difference_(a["d"][0], views, a["g0"], offsets, a["losses"][:1])


def assert_same_arguments(a, b):
    torch.cuda.synchronize()
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert_same_bits(x.cpu(), y.cpu())


@pytest.mark.parametrize(("buffer", "storage"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("k", [1, 3, 14, 32])
def test_blocks_that_take_many_tiles_leave_what_the_cpu_does(k, buffer, storage):
    here = step_arguments("cpu", k, buffer, storage, LONG)
    there = on("cuda", here)

    def called(a):
        heavy = {"p": a["p"], "p_next": a["p_next"]}
        step = (a["d"], a["q"], a["g0"], a["g1"], a["offsets"], a["state"])
        ops.recenter_(a["q"], a["copies"], a["d"], a["theta"], *step[4:], **heavy)
        yield ops.ascent_(*step)
        yield ops.ascent_(*step, theta=a["theta"], momentum=0.5, **heavy)
        yield ops.gram(a["d"], a["d"])
        yield ops.gram(a["d"], a["q"])
        transform = ops.state_field(a["state"], k, "transform")
        ops.combine_(a["d"], a["d"], transform.contiguous())
        yield ops.project_(a["v"], a["q"], a["coefficients"])

    for actual, expected in zip(called(there), called(here), strict=True):
        largest = float(expected.abs().max())
        assert float((actual.cpu() - expected).abs().max()) <= 1e-12 * largest
    assert_same_arguments(there, here)


@pytest.mark.parametrize(("buffer", "storage"), [(F32, F32), (F32, BF16), (F64, F64)])
@pytest.mark.parametrize("k", COUNTS)
def test_a_graph_replayed_is_the_steps_taken_one_by_one(k, buffer, storage):
    eager, captured = (step_arguments("cuda", k, buffer, storage) for _ in range(2))
    for _ in range(6):
        take_step(eager)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        take_step(captured)  # what is loaded at a first call mustn't be within the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_step(captured)
    for _ in range(5):
        graph.replay()
    assert_same_arguments(captured, eager)


def test_no_op_waits_for_the_device():
    cases = [step_arguments("cuda", k) for k in COUNTS]
    for a in cases:
        take_step(a)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # a second or more of work before ours
    end = torch.cuda.Event()
    for a in cases:
        take_step(a)
    end.record()
    assert not end.query()
    torch.cuda.synchronize()


def test_ops_run_on_the_current_stream():
    reference, a = step_arguments("cuda", 3), step_arguments("cuda", 3)
    take_step(reference)
    torch.cuda.synchronize()
    g0 = [torch.full_like(g, float("nan")) for g in a["g0"]]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 28)  # on another stream, the ops would read NaN meanwhile
        for to, g in zip(g0, a["g0"], strict=True):
            to.copy_(g)
        a["g0"] = g0
        take_step(a)
    side.synchronize()
    assert_same_arguments(a, reference)


@pytest.mark.skipif(MISSING is not None or torch.cuda.device_count() < 2, reason="one GPU here")
def test_ops_run_where_their_tensors_are():
    first, second = step_arguments("cuda:0", 3), step_arguments("cuda:1", 3)
    with torch.cuda.device(0):
        take_step(first)
        take_step(second)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_same_arguments(first, second)
    mixed = step_arguments("cuda:0", 3)
    mixed["state"] = mixed["state"].to("cuda:1")
    with pytest.raises(RuntimeError, match="state: expected a tensor on cuda:0, got one on cuda:1"):
        take_step(mixed)


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


@pytest.mark.parametrize("name", ["samples", "tokens", "masked", "tokens, summed", "hidden tokens"])
def test_batches_on_the_gpu_count_what_they_do_on_the_cpu(name):
    found = []
    for device in ("cpu", "cuda"):
        model = weighted_losses.net().to(device)
        parts = [on(device, part) for part in weighted_losses.cut(weighted_losses.whole())]
        given = {
            "data": parts,
            "sizes": (lambda b: (b["labels"] != -100).sum()) if name == "tokens" else None,
        }
        loss = weighted_losses.ALL[name]
        operator = lyapcuda.HessianOperator(lambda b: loss(model, b), model.parameters(), **given)  # noqa: B023
        product = operator @ torch.ones(operator.shape[0], dtype=F64, device=device)
        tracker = lyapcuda.CurvatureTracker(model.parameters())
        tracker.step(lambda b: loss(model, b), batches=parts, leave_grad=True)  # noqa: B023
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((product.cpu(), gradient.cpu(), torch.tensor(operator.weights)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_opcheck(row):
    op = getattr(torch.ops.lyapcuda, row.op).default
    k = min(3, row.counts[-1])
    a = on("cuda", row.arguments(row.inputs(SIZES[:5], k, *row.dtypes[0]), list(row.forms)[-1]))
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    options = {name: v for name, v in a.items() if name not in names and v is not None}
    torch.library.opcheck(op, tuple(a[name] for name in names), options)
