"""What holds for every op alike: schemas, shapes for tracing, versions, instruction sets."""

import os
import subprocess
import sys

import pytest
import torch

import op_digests
import simt_library
from lyapcuda import ops
from op_inputs import F64, Inputs, assert_same_bits, cloned, tensors_of
from op_table import ROWS, TABLE

SIZES = [5, 33, (), (2, 9)]
LOSSES = torch.tensor([0.3, 0.4], dtype=F64)
of_ops = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def names_of(namespace):
    return {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{namespace}::")
    }


def schema_of(row):
    return getattr(torch.ops.lyapcuda, row.op).default._schema


def calls(row):
    """(form, arguments) of every form; one form with one row, and of the other dtypes."""
    last = list(row.forms)[-1]
    cases = [(few(row)[-1], row.dtypes[0], form) for form in row.forms]
    cases += [(1, dtypes, last) for dtypes in row.dtypes]
    for k, dtypes, form in cases:
        yield form, row.arguments(row.inputs(SIZES, k, *dtypes), form)


def few(row):
    return [k for k in (1, 3) if k in row.counts]


def test_the_table_has_every_op():
    assert {row.op for row in ROWS} == names_of("lyapcuda") <= set(ops.__all__)


@of_ops
def test_what_is_written_is_what_the_schema_says(row):
    arguments = schema_of(row).arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    rows = [other for other in ROWS if other.op == row.op]
    assert written == {name for other in rows for name in other.written}


@pytest.mark.parametrize("library", simt_library.HERE)
def test_a_cuda_backend_has_every_op_with_the_same_schema(library):
    if library != "cuda":
        simt_library.simt()
    namespace, key = ("lyapcuda", "CUDA") if library == "cuda" else ("lyapcuda_simt", "CPU")
    assert names_of(namespace) == names_of("lyapcuda")
    for row in ROWS:
        table = torch._C._dispatch_dump(f"{namespace}::{row.op}")
        assert any(line.startswith(f"{key}: ") for line in table.splitlines())
        ours = getattr(getattr(torch.ops, namespace), row.op).default._schema
        assert str(ours).split("::")[1] == str(schema_of(row)).split("::")[1]


@of_ops
def test_opcheck(row):
    op = getattr(torch.ops.lyapcuda, row.op).default
    for form, arguments in calls(row):
        names = [a.name for a in op._schema.arguments if not a.kwarg_only]
        given = tuple(arguments[name] for name in names)
        options = {n: v for n, v in arguments.items() if n not in names and v is not None}
        # Traced as a whole too, which takes longest, in the last form.
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        tests += ["test_aot_dispatch_dynamic"] if form == list(row.forms)[-1] else []
        torch.library.opcheck(op, given, options, test_utils=tests)


@of_ops
def test_the_versions_of_what_is_written_count(row):
    for form, arguments in calls(row):
        before = {name: [t._version for t in tensors_of(v)] for name, v in arguments.items()}
        row.call(arguments)
        for name, versions in before.items():
            now = [t._version for t in tensors_of(arguments[name])]
            # With a panel descend_ only reads the buffer.
            moved = name in row.written and (row.name, name) != (
                "descend_, along vectors",
                "buffer",
            )
            pairs = list(zip(now, versions, strict=True))
            assert all(a > b if moved else a == b for a, b in pairs), (form, name)


@of_ops
def test_compiled_calls_give_the_same_bits(row):
    function = getattr(ops, row.op)
    for form in (list(row.forms)[0], list(row.forms)[-1]):
        k = min(3, row.counts[-1])
        arguments = row.arguments(row.inputs(SIZES, k, *row.dtypes[0]), form)
        eager = cloned(arguments)
        expected = function(**eager)
        torch._dynamo.reset()
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(**arguments)
        pairs = zip(tensors_of([found, arguments]), tensors_of([expected, eager]), strict=True)
        for a, b in pairs:
            assert_same_bits(a, b)


@pytest.mark.parametrize("k", [1, 3])
def test_a_whole_step_compiles(k):
    def step(a):
        again = ops.state_field(a["state"], k, "again")
        transform = ops.state_field(a["state"], k, "transform")
        gram = ops.ascent_(a["d"], a["q"], a["g0"], a["g1"], a["offsets"], a["state"])
        ops.benettin_(a["state"], gram, LOSSES, k)
        ops.combine_(a["d"], a["d"], transform, gate=again)
        ops.benettin_refine_(a["state"], ops.gram(a["d"], a["d"], gate=again), k)
        where = (a["theta"], a["offsets"], a["state"])
        ops.recenter_(a["q"], a["copies"], a["d"], *where)
        slopes = ops.slopes_(a["theta"], a["g0"], a["offsets"], a["d"], a["state"])
        along = {"panel": a["d"], "slopes": slopes, "offsets": a["offsets"]}
        return ops.descend_(a["theta"], a["g0"], a["state"], **along)

    inputs = Inputs([5, 33], k)
    ascent = TABLE["ascent_"].arguments(inputs, "realised")
    eager = ascent | {"copies": inputs.panel()}
    traced = cloned(eager)
    torch._dynamo.reset()
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(traced)
    assert_same_bits(found, step(eager))
    for a, b in zip(tensors_of(traced), tensors_of(eager), strict=True):
        assert_same_bits(a, b)


def test_ops_and_fakes_can_be_those_of_another_library(monkeypatch):
    library = torch.library.Library("lyapcuda_tests", "FRAGMENT")
    schema = "gram(Tensor a, Tensor b, *, Tensor? gate=None, Tensor? weights=None) -> Tensor"
    library.define(schema)
    library.impl("gram", lambda a, b, **options: a.new_full((2, 2), 7.0, dtype=F64), "CPU")
    ops.register_fakes("lyapcuda_tests")
    a = torch.zeros(2, 5)
    torch.library.opcheck(torch.ops.lyapcuda_tests.gram.default, (a, a), {})
    monkeypatch.setattr("lyapcuda.ops.library.namespace", torch.ops.lyapcuda_tests)
    assert (ops.gram(a, a) == 7).all()


# --- instruction sets ----------------------------------------------------------------------------


def python(*arguments, **environment):
    """Standard output of a fresh interpreter, which sees what this one can import."""
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, check=True, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ).stdout.split("\n")


def test_every_instruction_set_gives_the_same_bits():
    baseline = python(op_digests.__file__, LYAPCUDA_SIMD="baseline")
    found = list(op_digests.lines())
    assert len(found) > 250 and [*found, ""] == baseline


def test_the_instruction_set_can_be_turned_off():
    code = "from lyapcuda import ops; print(ops.build_info()['simd'])"
    assert python("-c", code, LYAPCUDA_SIMD="baseline") == ["baseline", ""]
