"""The CUDA backend against the CPU's, op by op and in whole runs.

Every test runs on the emulator of csrc/simt, with the warps of a block in either order; and, where
there is a GPU, there. The ops' own tests run again in test_cuda_binding_again.py; what needs a GPU
is in test_cuda_binding_gpu.py.
"""

import functools
import math

import pytest
import torch

import lyapcuda
import nets
import simt_library
from lyapcuda import ops
from op_calls import small_calls
from ops_cases import (
    DTYPES,
    F16,
    F32,
    F64,
    GUARD,
    KINDS,
    SUM,
    ascent_options,
    assert_same_bits,
    make_case,
    state_with,
    surroundings,
)

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.skipif("cuda" in simt_library.HERE, reason="the tests above run on it")
def test_there_is_a_gpu():
    pytest.skip(simt_library.missing("cuda"))


def names_of(namespace):
    return {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{namespace}::")
    }


def test_every_op_has_a_cuda_implementation_of_the_same_schema(library):
    if library == "cuda":
        namespace, key = "lyapcuda", "CUDA"
    else:
        namespace, key = "lyapcuda_simt", "CPU"
    assert names_of(namespace) == names_of("lyapcuda") != set()
    for name in names_of("lyapcuda"):
        table = torch._C._dispatch_dump(f"{namespace}::{name}")
        (line,) = (line for line in table.splitlines() if line.startswith(f"{key}: "))
        assert "csrc/cuda" in line
        ours = getattr(getattr(torch.ops, namespace), name).default._schema
        theirs = getattr(torch.ops.lyapcuda, name).default._schema
        assert str(ours).split("::")[1] == str(theirs).split("::")[1]


# --- against the CPU backend ---------------------------------------------------------------------


def close_sums(actual, expected, case):
    """Within 1e-14 of what the terms of each sum amount to."""
    size = {name: math.sqrt(float(expected[SUM[name]])) for name in ("qq", "yy", "carried_q")}
    q, y = max(size["qq"], size["carried_q"]), size["yy"]
    # The CPU may work Σd² out from the other sums, before d is rounded: here it is that of d.
    dd = float(case.d[~case.gaps()].double().square().sum())
    assert abs(float(actual[SUM["dd"]]) - dd) <= 1e-14 * dd
    terms = {"qq": q * q, "qy": q * y, "yy": y * y, "carried_q": q * q, "carried_y": q * y}
    for name, scale in terms.items():
        error = abs(float(actual[SUM[name]] - expected[SUM[name]]))
        assert error <= 1e-14 * scale, (name, error, scale)


def check_like_the_cpu(sizes, buffer, storage, **options):
    """Every op in every form: elements to the bit, sums to their last digits."""
    for realised, heavy in KINDS:
        here, there = (make_case(sizes, buffer, storage, **options) for _ in range(2))
        results = []
        for case in (here, there):
            moved = ascent_options(case, realised=realised, heavy=heavy)
            step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
            if case is there:
                with simt_library.cpu():
                    results.append(ops.ascent_(*step, **moved))
            else:
                results.append(ops.ascent_(*step, **moved))
        assert_same_case(here, there)
        if any(math.prod(size if isinstance(size, tuple) else (size,)) for size in sizes):
            close_sums(*results, here)
        else:
            assert_same_bits(*results)

    def both(run):
        here, there = (make_case(sizes, buffer, storage, **options) for _ in range(2))
        result = run(here)
        with simt_library.cpu():
            expected = run(there)
        if result is not None:
            assert_same_bits(result, expected)
        assert_same_case(here, there)

    for committed in (0.0, 1.0):
        both(
            lambda c, committed=committed: ops.recenter_(
                c.theta1, c.q, c.p, c.theta, c.offsets, state_with(c.state, committed=committed)
            )
        )
        both(
            lambda c, committed=committed: ops.recenter_(
                c.theta1,
                c.q,
                c.p,
                c.theta,
                c.offsets,
                state_with(c.state, committed=committed),
                p=c.d,
                p_previous=c.p_next,
            )
        )
    for changed in ({}, {"h_ema": -1.0}, {"h_ema": math.nan}, {"accepted": 0.0}):
        for kind in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):

            def descend(c, changed=changed, kind=kind):
                beside = {"buffer": c.p, "offsets": c.offsets} if kind else {}
                state = state_with(c.state, **changed)
                options = {"weight_decay": 0.1, "gain": 1.5, **kind, **beside}
                return ops.descend_(c.theta, c.g0, state, **options)

            both(descend)
    both(lambda c: ops.stream_copy_(c.d, c.q))


def assert_same_case(here, there):
    for a, b in zip(here.tensors(), there.tensors(), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(surroundings(a), surroundings(b))


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_tails_and_misaligned_segments_are_the_cpus(buffer, storage, shift):
    for gap in (5, 16):
        sizes = [9, 0, (), (3, 0, 2), 16385, (33, 7), 1, 4097]
        check_like_the_cpu(sizes, buffer, storage, shift=shift, gap=gap)


@pytest.mark.parametrize(
    ("more", "dtypes"), zip((0, 1, 1, simt_library.SEGMENTS + 3), DTYPES, strict=True)
)
def test_more_tensors_than_one_launch_takes_are_the_cpus(more, dtypes):
    sizes = [5001, 0, *(k * 37 % 101 + 1 for k in range(simt_library.SEGMENTS + more - 1))]
    check_like_the_cpu(sizes, *dtypes, shift=more % 2)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
@pytest.mark.parametrize("sizes", [[], [0], [0] * (simt_library.SEGMENTS + 9)])
def test_nothing_at_all_is_the_cpus(buffer, storage, sizes):
    check_like_the_cpu(sizes, buffer, storage)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
def test_many_chunks_are_the_cpus(buffer, storage):
    check_like_the_cpu([100003], buffer, storage, gap=16)


def test_any_number_of_processors_gives_the_same_elements(library):
    if library == "cuda":
        pytest.skip("a GPU has as many as it has")
    reverse, cases, sums = library == "simt reverse", [], []
    for processors in (1, 2, 7):
        ops.library.namespace = simt_library.simt(reverse=reverse, processors=processors)
        case = make_case([100003, 7, 33])
        options = ascent_options(case, realised=True, heavy=True)
        step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        sums.append(ops.ascent_(*step, **options))
        cases.append(case)
    ops.library.namespace = simt_library.simt(reverse=reverse)
    for case, other in zip(cases[1:], sums[1:], strict=True):
        assert_same_case(case, cases[0])
        close_sums(other, sums[0], case)


def test_reruns_give_the_same_bits():
    runs = []
    for _ in range(2):
        case = make_case([70001, 333])
        step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        runs.append((ops.ascent_(*step), case.d))
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


# --- devices -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(library):
    """A device that is not the library's; tensors there reach the kernels' checks."""
    if library == "cuda":
        yield "cpu"
        return
    # Tensors on "meta" would be stopped by the dispatcher; hand them on to the checks.
    through = torch.library.Library("lyapcuda_simt", "IMPL", "Meta")
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in names_of("lyapcuda_simt"):
        op = getattr(torch.ops.lyapcuda_simt, name).default
        through.impl(name, functools.partial(op.redispatch, cpu))
    yield "meta"
    through._destroy()


def test_the_calls_are_of_every_op():
    assert set(small_calls("cpu")) == names_of("lyapcuda")


@pytest.mark.parametrize("name", sorted(names_of("lyapcuda")))
def test_a_tensor_on_another_device_is_named(library, elsewhere, name):
    here = "cuda" if library == "cuda" else "cpu"
    namespace = torch.ops.lyapcuda if library == "cuda" else torch.ops.lyapcuda_simt
    op = getattr(namespace, name)
    for wrong, value in small_calls(here)[name].items():
        tensors = value if isinstance(value, list) else [value]
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            arguments = small_calls(here)[name]
            moved = tensor.to(elsewhere)
            if isinstance(value, list):
                arguments[wrong][i] = moved
            else:
                arguments[wrong] = moved
            with pytest.raises(RuntimeError, match=rf"{wrong}(\[{i}\])?: expected a "):
                op(**arguments)


# --- a tracker -----------------------------------------------------------------------------------


def measured(name, dtype, steps, **options):
    """h and the interval of every step on a tiny net that is trained meanwhile."""
    case = nets.case(name, 1, dtype)
    tracker = lyapcuda.CurvatureTracker(case.model.parameters(), weight_decay=0.01, **options)
    trainer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    values = []
    for _ in range(steps):
        tracker.step(case.closure, leave_grad=True)
        trainer.step()
        values.append([float(tracker.h), float(tracker.beta), *tracker.interval.tolist()])
    return torch.tensor(values, dtype=F64), tracker.vector()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "SA"},
        {"estimate": "growth", "momentum": 0.5},
        {"estimate": "paper", "beta": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["tanh_mlp", "conv"])
def test_a_whole_run_measures_what_the_cpu_does(name, options):
    actual, q = measured(name, F64, 12, **options)
    with simt_library.cpu():
        expected, q_expected = measured(name, F64, 12, **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(q, q_expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_whole_run_in_less_precision_measures_what_the_cpu_does(dtype):
    # The elements are the same to the bit; only the sums' last digits differ. One step, since from
    # the second on these move roundings of q.
    actual, _ = measured("gelu_mlp", dtype, 1)
    with simt_library.cpu():
        expected, _ = measured("gelu_mlp", dtype, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def trained(steps):
    case = nets.case("gelu_mlp", 2, F64)
    optimizer = lyapcuda.LyapunovSGD(case.model.parameters(), warmup_iterations=20, max_lr=1.0)
    return [float(optimizer.step(case.closure)) for _ in range(steps)]


@pytest.mark.filterwarnings("ignore:h0 was not stable")
def test_the_optimizer_takes_the_steps_it_takes_on_the_cpu():
    actual = trained(8)
    with simt_library.cpu():
        expected = trained(8)
    assert actual == pytest.approx(expected, rel=1e-10)
    assert expected[-1] < expected[0]


def test_a_gradient_that_is_not_finite_leaves_the_state_alone():
    case = make_case([300], F32, F16)
    case.g1[0][17] = math.inf
    sums = ops.ascent_(case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    before = case.state.clone()
    ops.exponent_(case.state, sums, torch.ones(2, dtype=F64))
    changed = {
        name
        for i, name in enumerate(ops.STATE_FIELDS)
        if not torch.equal(case.state[i].nan_to_num(GUARD), before[i].nan_to_num(GUARD))
    }
    assert changed == {"accepted", "committed", "skipped"}
