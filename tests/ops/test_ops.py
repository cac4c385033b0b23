"""What holds for every op alike: schemas, fakes, compilation, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

import ops_cases
import panel_cases
from lyapcuda import ops
from op_calls import LOSSES, NAMES, calls
from ops_cases import DTYPES, F64, assert_same_bits, make_case, run_every_op, threads
from panel_cases import make_panel_case, run_every_panel_op


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
    monkeypatch.setattr("lyapcuda.ops.library.namespace", torch.ops.lyapcuda_tests)
    assert (ops.gram(a, a) == 7).all()


def python(*arguments, **environment):
    """Standard output of a fresh interpreter, which sees what this one can import."""
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, check=True, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ).stdout.split()


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    for module, run in ((ops_cases, run_every_op), (panel_cases, run_every_panel_op)):
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
