"""What holds for every op alike: schemas, fakes, compilation, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

import ops_support
import panel_support
from lyapcuda import ops
from ops_support import DTYPES, F64, assert_same_bits, make_case, run_every_op, threads
from panel_support import make_panel_case, run_every_panel_op
from quasi_newton_support import KINDS, newton_case, step_arguments, step_options

SUMS = torch.tensor([1.5, 1.0, 0.5, 1.0, 1.0, 0.5], dtype=F64)
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)


def calls(buffer=torch.float32, storage=torch.float32):
    """(name, tensors and other positional arguments, keyword arguments) of each op."""
    case = make_case([5, 33, (), (2, 9)], buffer, storage)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    number = torch.tensor([0.3], dtype=F64)
    skipped = ops_support.state_with(case.state, committed=0.0)
    lost = ops_support.state_with(case.state, reseed=1.0)
    gradients = (case.g1, case.g0, case.offsets, number.clone())
    return {
        "ascent_": (step, {}),
        "ascent_ with everything": (step, {"sign": -1, "weight_decay": 0.1, **moved}),
        "exponent_": ((case.state, SUMS.clone(), LOSSES.clone()), {"estimate": 1, "ema": 0.9}),
        "secant_": ((case.state, SUMS.clone()), {"sign": -1}),
        "recenter_": ((case.theta1, case.q, case.p, case.theta, case.offsets, case.state), {}),
        "recenter_ with momentum": (
            (case.theta1, case.q, case.p, case.theta, case.offsets, skipped),
            {"p": case.d, "p_previous": case.p_next},
        ),
        "descend_": ((case.theta, case.g0, case.state), {"weight_decay": 0.1}),
        "descend_ with everything": (
            (case.theta, case.g0, case.state),
            {
                "momentum": 0.9,
                "nesterov": True,
                "buffer": case.p,
                "offsets": case.offsets,
                "factor": torch.ones(1, dtype=F64),
            },
        ),
        "stream_copy_": ((case.d, case.q), {}),
        "reseed_": (
            (case.q, case.offsets, [t.numel() for t in case.theta], lost),
            {"elements": 57, "p": case.p},
        ),
        "displace_": ((case.theta1, case.q, case.theta, case.offsets, number), {}),
        "difference_": ((case.d, *gradients), {}),
        "difference_ with everything": (
            (case.d, *gradients),
            {"keep": 0.5, "weight_decay": 0.1, "v": case.q},
        ),
        **panel_calls(buffer, storage),
    }


def panel_calls(buffer, storage):
    k = 3
    case = make_panel_case(k, [5, 33, (), (2, 9)], buffer, storage, pending=1.0, again=1.0)
    step = (case.d, case.q, case.g0, case.g1, case.offsets, case.state)
    moved = {"theta": case.theta, "momentum": 0.9, "p": case.p, "p_next": case.p_next}
    identity = torch.eye(2 * k, dtype=F64)
    gate = torch.ones(1, dtype=F64)
    return {
        "panel_ascent_": (step, {}),
        "panel_ascent_ with everything": (step, {"sign": -1, "weight_decay": 0.1, **moved}),
        "benettin_": ((case.state, identity, LOSSES.clone(), k), {"estimate": 1}),
        "benettin_refine_": ((case.state, torch.eye(k, dtype=F64), k), {}),
        "panel_recenter_": (
            (case.q, case.copies, case.d, case.theta, case.offsets, case.state),
            {},
        ),
        "gram": ((case.q, case.d), {"gate": gate}),
        "combine_": ((case.d, case.q, torch.eye(k, dtype=F64)), {"gate": gate}),
        "project_": ((case.d[0].clone(), case.q, torch.ones(k, dtype=F64)), {}),
        **newton_calls(storage),
    }


def newton_calls(storage):
    case = newton_case(3, [5, 33, (), (2, 9)], storage)
    step, slopes = step_arguments(case), torch.ones(3, dtype=F64)
    everything = step_options(case, KINDS[2], factor=torch.ones(1, dtype=F64))
    return {
        "panel_slopes_": (step, {}),
        "panel_slopes_ with everything": (step, everything),
        "panel_descend_": ((*step, slopes), {}),
        "panel_descend_ with everything": ((*step, slopes), {"max_lr": 0.1, **everything}),
    }


NAMES = list(calls())


def function_of(name):
    name = name.split()[0]
    return getattr(ops, name)


def tensors_of(args, kwargs):
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def test_every_op_is_here():
    registered = {
        n.split("::")[1]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("lyapcuda::")
    }
    assert registered == {name.split()[0] for name in NAMES}
    assert registered <= set(ops.__all__)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, buffer, storage):
    args, kwargs = calls(buffer, storage)[name]
    op = getattr(torch.ops.lyapcuda, name.split()[0])
    torch.library.opcheck(op.default, args, kwargs)


@pytest.mark.parametrize(("buffer", "storage"), DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_calls_give_the_same_bits(name, buffer, storage):
    function = function_of(name)
    eager_args, eager_kwargs = calls(buffer, storage)[name]
    args, kwargs = calls(buffer, storage)[name]
    eager = function(*eager_args, **eager_kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(*args, **kwargs)
    if eager is not None:
        assert_same_bits(compiled, eager)
    pairs = zip(tensors_of(args, kwargs), tensors_of(eager_args, eager_kwargs), strict=True)
    for a, b in pairs:
        assert_same_bits(a, b)


def test_a_whole_step_compiles():
    def step(case):
        sums = ops.ascent_(case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        ops.exponent_(case.state, sums, LOSSES, control=True)
        ops.recenter_(case.theta1, case.d, case.q, case.theta, case.offsets, case.state)
        return ops.descend_(case.theta, case.g0, case.state)

    eager, traced = make_case([5, 33]), make_case([5, 33])
    torch._dynamo.reset()
    lr = torch.compile(step, backend="aot_eager", fullgraph=True)(traced)
    assert_same_bits(lr, step(eager))
    for a, b in zip(traced.tensors(), eager.tensors(), strict=True):
        assert_same_bits(a, b)


def test_a_whole_panel_step_compiles():
    k = 3

    def step(case):
        sums = ops.panel_ascent_(case.d, case.q, case.g0, case.g1, case.offsets, case.state)
        ops.benettin_(case.state, sums, LOSSES, k)
        again = ops.panel_field(case.state, k, "again")
        transform = ops.panel_field(case.state, k, "transform")
        ops.combine_(case.d, case.d, transform, gate=again)
        ops.benettin_refine_(case.state, ops.gram(case.d, case.d, gate=again), k)
        ops.panel_recenter_(case.q, case.copies, case.d, case.theta, case.offsets, case.state)

    eager, traced = make_panel_case(k, [5, 33]), make_panel_case(k, [5, 33])
    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(traced)
    step(eager)
    for a, b in zip(traced.tensors(), eager.tensors(), strict=True):
        assert_same_bits(a, b)


def test_ops_and_fakes_can_be_those_of_another_library(monkeypatch):
    library = torch.library.Library("lyapcuda_tests", "FRAGMENT")
    library.define("gram(Tensor a, Tensor b, *, Tensor? gate=None) -> Tensor")
    library.impl("gram", lambda a, b, gate=None: a.new_full((2, 2), 7.0, dtype=F64), "CPU")
    ops.register_fakes("lyapcuda_tests")
    a = torch.zeros(2, 5)
    torch.library.opcheck(torch.ops.lyapcuda_tests.gram.default, (a, a), {})
    monkeypatch.setattr(ops, "_library", torch.ops.lyapcuda_tests)
    assert (ops.gram(a, a) == 7).all()


def python(*arguments, **environment):
    """Standard output of a fresh interpreter, which sees what this one can import."""
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, check=True, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ).stdout.split()


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    for module, run in ((ops_support, run_every_op), (panel_support, run_every_panel_op)):
        baseline = python(module.__file__, LYAPCUDA_SIMD="baseline")
        assert len(baseline) > 100
        for count in (1, 2, 2):
            with threads(count):
                assert run() == baseline


def test_the_instruction_set_can_be_turned_off():
    code = "from lyapcuda import ops; print(ops.build_info()['simd'])"
    assert python("-c", code, LYAPCUDA_SIMD="baseline") == ["baseline"]


def test_states_refuse_unknown_fields():
    with pytest.raises(ValueError, match="unknown state fields"):
        ops.new_state("cpu", lamda=1.0)
