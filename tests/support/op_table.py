"""A table of the ops, a row an op: how to draw a call, what it has to leave, and the check of both.

    check(TABLE["ascent_"], inputs, "realised")

draws the arguments of that form of the op from `op_inputs.Inputs`, calls it (`lyapcuda.ops`, on
whatever library that is set to) and holds all that it leaves, in the memory around its arguments
too, against the fp64 oracle (`lyapcuda.ops.reference`) and its arithmetic (`op_arithmetic`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import op_arithmetic as arithmetic
from lyapcuda import ops
from lyapcuda.ops import reference
from op_arithmetic import Arguments, Products
from op_inputs import (
    COUNTS,
    DTYPES,
    F32,
    F64,
    Inputs,
    at,
    bits,
    cloned,
    eps,
    number,
    tensors_of,
    whole,
)

#: Without momentum, heavy-ball, Nesterov's.
MOMENTA: dict[str, dict[str, Any]] = {
    "plain": {},
    "heavy": {"momentum": 0.5},
    "nesterov": {"momentum": 0.5, "nesterov": True},
}


@dataclass(frozen=True)
class Row:
    """An op, or one of its forms that has other arguments."""

    #: Its name in `lyapcuda.ops`, and after a comma what tells it from other rows of that op.
    name: str
    #: Form → what `draw` is given beside the inputs.
    forms: Mapping[str, Mapping[str, Any]]
    draw: Callable[..., Arguments]
    #: What the oracle returns, in order: names of arguments, "result" for what the op returns.
    gives: tuple[str, ...]
    #: What it leaves to the bit; None: held to the oracle alone.
    arithmetic: Callable[[Arguments, Inputs], Arguments] | None = None
    #: Arguments that need a minus for all of the oracle's terms to have one sign.
    minus: tuple[str, ...] = ()
    #: Where what is written may lie: name → arguments to replace, or None where it can't.
    over: Mapping[str, Callable[[Arguments, Inputs], Arguments | None]] = field(
        default_factory=dict
    )
    #: Rows of its panels.
    counts: tuple[int, ...] = (1,)
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] = tuple(DTYPES)
    #: Whether its buffers have segments; others are read and written whole.
    segments: bool = True
    #: Whether its results are scalars of a step, which LAPACK has to other last digits.
    scalars: bool = False

    @property
    def op(self) -> str:
        return self.name.split(",")[0]

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(name for name in self.gives if name != "result")

    def inputs(self, sizes, k=1, buffer=F32, storage=F32, *, gap=5, **options) -> Inputs:
        return Inputs(sizes, k, buffer, storage, gap=gap if self.segments else 0, **options)

    def arguments(self, inputs: Inputs, form: str) -> Arguments:
        return self.draw(inputs, **self.forms[form])

    def call(self, arguments: Arguments) -> Any:
        return getattr(ops, self.op)(**arguments)

    def oracle(self, a: Arguments) -> Arguments:
        function = getattr(reference, self.op)
        taken = inspect.signature(function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            a = {name: value for name, value in a.items() if name in taken}
        found = function(**a)
        found = found if isinstance(found, tuple) else (found,)
        return {n: v for n, v in zip(self.gives, found, strict=True) if v is not None}

    def sizes(self, a: Arguments) -> Arguments:
        """The oracle of sizes alone: what its errors of rounding are relative to."""

        def size(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [size(name, item) for item in value]
            if not isinstance(value, Tensor):
                return -value if name in self.minus else 1 if name == "sign" else value
            # Below the smallest normal number errors shrink no more.
            least = torch.finfo(F64 if value.dtype == F64 else F32).smallest_normal
            value = value.abs() + least * (value != 0)
            return -value if name in self.minus else value

        return self.oracle({name: size(name, value) for name, value in a.items()})


# --- the checks ----------------------------------------------------------------------------------


def put(target: Any, value: Any) -> None:
    """Writes what is not NaN in ``value``, rounded to the target's dtype."""
    if isinstance(target, list):
        for one, other in zip(target, value, strict=True):
            put(one, other)
    else:
        assert target.shape == value.shape
        target.copy_(torch.where(value.isnan(), target, value.to(target.dtype)))


def assert_same(actual: Arguments, expected: Arguments, exact: bool) -> None:
    """All memory of two calls' arguments; ``exact``: −0 is 0 in what is written."""
    for name, value in actual.items():
        pairs = zip(tensors_of(value), tensors_of(expected[name]), strict=True)
        for i, (one, other) in enumerate(pairs):
            a, b = whole(one), whole(other)
            if torch.equal(bits(a), bits(b)):
                continue
            different = bits(a) != bits(b)
            if exact:
                different &= a != b
            count = int(different.sum())
            assert not count, f"{name}, tensor {i}: {count} of {a.numel()} elements differ"


def check(row: Row, inputs: Inputs, form: str, over: str | None = None) -> Any:
    """Calls an op and holds it to oracle and arithmetic; returns what it returned."""
    arguments = row.arguments(inputs, form)
    if over is not None:
        replaced = row.over[over](arguments, inputs)
        if replaced is None:
            return None
        arguments |= replaced
    try:
        return check_call(row, inputs, arguments)
    except AssertionError as error:
        error.add_note(f"{row.name}, {form}{f', {over}' if over else ''}: {inputs}")
        raise


def check_call(row: Row, inputs: Inputs, arguments: Arguments) -> Any:
    oracle, before = row.oracle(arguments), cloned(arguments)
    known = oracle if inputs.exact and not row.scalars else None
    if known is None and row.arithmetic is not None:
        known = row.arithmetic(arguments, inputs)
    known = known or {}
    expected = cloned(arguments)
    for name in row.written:
        if name in known:
            put(expected[name], known[name])
    result = row.call(arguments)
    for name in row.written:
        if name in oracle and name not in known:  # held to the oracle below, as closely as it can
            put(expected[name], masked(arguments[name], oracle[name]))
    assert_same(arguments, expected, inputs.exact)
    if "result" in oracle:
        wanted = known["result"]
        assert result.dtype == F64 and result.shape == oracle["result"].shape
        if isinstance(wanted, Products):
            wanted.check(result)
        else:
            assert torch.equal(result, wanted), f"returned {result} instead of {wanted}"
    if row.scalars:
        assert_close_states(arguments["state"], oracle["state"], arguments["k"])
    elif not inputs.exact:
        check_close(row, inputs, before, arguments, result, oracle)
    return result


def assert_close_states(actual: Tensor, expected: Tensor, k: int) -> None:
    """Field by field, to the last digits that LAPACK and the ops have in common."""
    for name in ops.state_fields(k):
        wanted = ops.state_field(expected, k, name)
        # A residual is the root of a difference of terms of the size of ‖H‖².
        loose = name in ("residual", "width")
        size = float(wanted.nan_to_num().abs().max())
        torch.testing.assert_close(
            ops.state_field(actual, k, name),
            wanted,
            rtol=0,
            atol=1e-5 if loose else 1e-10 * max(size, 1e-300),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def masked(actual: Any, oracle: Any) -> Any:
    if isinstance(actual, list):
        return [masked(a, o) for a, o in zip(actual, oracle, strict=True)]
    return torch.where(oracle.isnan(), oracle, actual.double())


def check_close(row, inputs, before, arguments, result, oracle) -> None:
    """Within the roundings of the longest path from an input to a result, each relative to the sum
    of the sizes of its terms."""
    sizes = row.sizes(before)
    terms = max([10, *(t.shape[0] + 10 for t in tensors_of(before) if t.dim() == 2)])
    added = math.sqrt(inputs.n) * eps(F64)  # of sums of doubles, in whatever order
    for name, wanted in oracle.items():
        actual = result if name == "result" else arguments[name]
        triples = (list(tensors_of(x)) for x in (actual, wanted, sizes[name]))
        for one, exact, size in zip(*triples, strict=True):
            unit = terms * eps(inputs.buffer) + eps(one.dtype) + added
            limit = unit * (size.abs() + torch.finfo(one.dtype).smallest_normal)
            error = (one.double() - exact).abs()
            right = exact.isnan() | (error <= limit.reshape(error.shape))
            assert right.all(), f"{name}: {error[~right].max()} away from the oracle"


# --- what calls are drawn from -------------------------------------------------------------------


def draw_ascent(i: Inputs, realised=False, heavy=False, metric=False, sign=1, **state) -> Arguments:
    a = {"d": i.panel(), "q": i.panel(), "g0": i.listed(0.3)}
    a |= {"g1": i.panel(dtype=i.storage, span=0.3), "offsets": i.offsets}
    a |= {"state": i.state(**state), "sign": sign, "weight_decay": i.number(0.5, 0.0123)}
    a |= {"theta": i.listed()} if realised else {}
    a |= {"metric": i.metric()} if metric else {}
    more = {"momentum": 0.5, "p": i.panel(), "p_next": i.panel()}
    return a | (more if heavy else {})


def draw_recenter(i: Inputs, heavy=False, metric=False, **state) -> Arguments:
    a = {"q": i.panel(), "copies": i.panel(dtype=i.storage), "d": i.panel()}
    a |= {"theta": i.listed(), "offsets": i.offsets, "state": i.state(**state)}
    a |= {"metric": i.metric()} if metric else {}
    if heavy:
        a |= {"p": i.panel(), "p_next": i.panel()}
        if i.k > 1:  # whole rows are taken then: zeros stay zeros between the segments
            for name in ("p", "p_next"):
                a[name][:, ~i.used] = 0.0
    return a


def draw_reseed(i: Inputs, heavy=False, lost=True, seed=7, **state) -> Arguments:
    row = float(i.k // 2 + 1 if lost else 0)
    a = {"panel": i.panel(), "offsets": i.offsets, "sizes": i.counts}
    a |= {"state": i.state(reseed=row, **state), "elements": sum(i.counts) + 100, "seed": seed}
    return a | ({"p": i.panel()} if heavy else {})


def draw_step(i: Inputs, momentum=None, nesterov=False, factor=None, **state) -> Arguments:
    """What slopes_ and descend_ share."""
    a = {"theta": i.listed(), "gradient": i.listed(), "state": i.state(**state)}
    a |= {"weight_decay": i.number(0.5, 0.0123), "offsets": i.offsets}
    a |= {"factor": number(factor)} if factor is not None else {}
    more = {"momentum": momentum, "nesterov": nesterov, "buffer": i.flat()}
    return a | (more if momentum is not None else {})


def draw_slopes(i: Inputs, **form) -> Arguments:
    return draw_step(i, **form) | {"panel": i.panel()}


def draw_descend(i: Inputs, max_lr=10.0, gain=None, **form) -> Arguments:
    a = draw_step(i, k=1, **form) | {"max_lr": max_lr}
    a["gain"] = i.number(0.5, 0.7) if gain is None else gain
    if "buffer" not in a:
        del a["offsets"]
    return a


def draw_descend_along(i: Inputs, **form) -> Arguments:
    a = draw_step(i, **form) | {"panel": i.panel(), "max_lr": 10.0, "gain": i.number(0.5, 0.7)}
    return a | {"slopes": i.random(torch.zeros(i.k, dtype=F64))}


def draw_displace(i: Inputs, step=None) -> Arguments:
    a = {"copies": i.listed(), "v": i.flat(), "theta": i.listed(), "offsets": i.offsets}
    return a | {"step": number(i.number(0.25, 0.0371) if step is None else step)}


def draw_difference(i: Inputs, decay=False) -> Arguments:
    a = {"out": i.flat(), "plus": i.listed(), "minus": i.listed(), "offsets": i.offsets}
    a |= {"scale": number(i.number(-0.5, -3.3)), "weight_decay": 0.0}
    return a | ({"weight_decay": i.number(0.5, 0.0371), "v": i.flat()} if decay else {})


def draw_directional(i: Inputs) -> Arguments:
    return {"u": i.flat(), "g0": i.listed(), "g1": i.listed(), "offsets": i.offsets}


def draw_gram(i: Inputs, other=None, gate=None, weighted=False) -> Arguments:
    a = i.panel()
    b = a if other is None else i.panel(other)
    weights = {"weights": i.flat()} if weighted else {}
    return {"a": a, "b": b, "gate": None if gate is None else number(gate), **weights}


def draw_combine(i: Inputs, columns=None, gate=None) -> Arguments:
    columns = columns or i.k
    a = {"out": i.panel(columns), "panel": i.panel(), "matrix": i.matrix(i.k, columns)}
    return a | {"gate": None if gate is None else number(gate)}


def draw_project(i: Inputs) -> Arguments:
    rows = i.panel(max(i.k, 1))[: i.k]
    return {"w": i.flat(), "v": rows, "coefficients": i.matrix(i.k, 1)[:, 0].contiguous()}


def draw_benettin(
    i: Inputs, realised=False, momentum=0.0, refined=0.0, metric=False, **options
) -> Arguments:
    blocks = 2 + realised + (momentum > 0)
    rows = torch.randn(blocks * i.k, 3 * blocks * i.k, generator=i.generator, dtype=F64)
    rows[: i.k] += 4 * torch.eye(*rows[: i.k].shape)
    if realised:
        rows[2 * i.k : 3 * i.k] = rows[: i.k] + 1e-3 * rows[2 * i.k : 3 * i.k]
    a = {
        "state": i.state(again=0.0, refined=refined, first=0.4),
        "gram": 0.25 * rows @ rows.T,
        "k": i.k,
    }
    a |= {"losses": torch.tensor([0.3, 0.4], dtype=F64), "realised": realised}
    if metric:
        weighted = torch.rand(rows.shape[1], generator=i.generator, dtype=F64) * rows[-i.k :]
        a |= {"displaced": weighted @ weighted.T}
    return a | {"momentum": momentum, **options}


def draw_refine(i: Inputs, again=1.0) -> Arguments:
    # Nearly orthonormal rows of norm Δq, as the first pass leaves them.
    drawn = torch.randn(i.k, i.k, generator=i.generator, dtype=F64)
    rows = torch.eye(i.k, dtype=F64) + 0.05 * drawn / i.k
    r = torch.eye(i.k, dtype=F64) * 2
    state = i.state(again=again, r=r, exponent=0.5)
    return {"state": state, "gram": 0.25 * rows @ rows.T, "k": i.k}


# --- where what is written may lie ---------------------------------------------------------------


def is_argument(written: str, read: str, *, copies: bool = False):
    """The one is the other; where they are of the same dtype."""

    def over(a: Arguments, i: Inputs) -> Arguments | None:
        return {written: a[read]} if a[written].dtype == a[read].dtype else None

    return over


def views_of(lists: str, buffer: str, offsets="offsets"):
    """The tensors of a list are views of a buffer, at their offsets."""

    def over(a: Arguments, i: Inputs) -> Arguments | None:
        if i.buffer != i.storage:
            return None
        views = at(a[buffer], a[lists], a[offsets])
        for view, t in zip(views, a[lists], strict=True):
            if lists != "copies":  # what is read keeps its values
                view.copy_(t)
        return {lists: views}

    return over


def first_rows(a: Arguments, i: Inputs) -> Arguments | None:
    rows = len(a["out"])
    return {"out": a["panel"][:rows]} if rows <= len(a["panel"]) else None


# --- the table -----------------------------------------------------------------------------------

KRYLOV = (*COUNTS, 33, 128)
BUFFERS = ((F32, F32), (F64, F64))
STEP_FORMS = {
    **MOMENTA,
    "factor": {"factor": 0.25},
    "no step": {"momentum": 0.5, "factor": float("nan")},
    "refused": {"momentum": 0.5, "accepted": 0.0},
}


class Reseed(Row):
    def oracle(self, a: Arguments) -> Arguments:
        found = {"panel": reference.reseed_(**{n: v for n, v in a.items() if n != "p"}).double()}
        if "p" in a:
            changed = found["panel"] != a["panel"].double()
            found["p"] = torch.where(changed, 0.0, a["p"].double())
        return found


ROWS = [
    Row(
        name="ascent_",
        draw=draw_ascent,
        forms={
            "plain": {},
            "descent": {"sign": -1},
            "realised": {"realised": True},
            "heavy": {"heavy": True},
            "realised, heavy": {"realised": True, "heavy": True, "sign": -1},
            "metric": {"metric": True},
            "realised, metric": {"realised": True, "metric": True},
        },
        gives=("d", "p_next", "result"),
        arithmetic=arithmetic.ascent,
        minus=("g0",),
        over={"d is q": is_argument("d", "q"), "d over g1": is_argument("d", "g1")},
        counts=tuple(COUNTS),
    ),
    Row(
        name="recenter_",
        draw=draw_recenter,
        forms={
            "pending": {},
            "not pending": {"pending": 0.0},
            "pending, heavy": {"heavy": True},
            "not pending, heavy": {"heavy": True, "pending": 0.0},
            "pending, metric": {"metric": True},
            "not pending, metric": {"metric": True, "pending": 0.0},
        },
        gives=("q", "copies", "p"),
        arithmetic=arithmetic.recenter,
        over={"copies over d": is_argument("copies", "d")},
        counts=tuple(COUNTS),
    ),
    Reseed(
        name="reseed_",
        draw=draw_reseed,
        forms={
            "one row": {},
            "heavy": {"heavy": True, "seed": 2**63 - 1},
            "another seed": {"seed": -1},
            "none is lost": {"heavy": True, "lost": False},
        },
        gives=("panel", "p"),
        arithmetic=lambda a, inputs: TABLE["reseed_"].oracle(a),
        counts=tuple(COUNTS),
        dtypes=BUFFERS,
    ),
    Row(
        name="slopes_",
        draw=draw_slopes,
        forms={**STEP_FORMS, "copies that met": {"momentum": 0.5, "pending": 0.0}},
        gives=("result", "buffer"),
        arithmetic=arithmetic.slopes,
        counts=tuple(COUNTS),
    ),
    Row(
        name="descend_",
        draw=draw_descend,
        forms={**STEP_FORMS, "bounded": {"max_lr": 0.125}},
        gives=("theta", "result", "buffer"),
        arithmetic=arithmetic.descend,
        minus=("gradient", "buffer", "weight_decay"),
    ),
    Row(
        name="descend_, along vectors",
        draw=draw_descend_along,
        forms={**STEP_FORMS, "copies that met": {"momentum": 0.5, "pending": 0.0}},
        gives=("theta", "result", "buffer"),
        arithmetic=arithmetic.rates,
        minus=("gradient", "buffer", "weight_decay"),
        counts=tuple(COUNTS),
    ),
    Row(
        name="displace_",
        draw=draw_displace,
        forms={"forward": {}, "back": {"step": -(2.0**-10)}},
        gives=("copies", "result"),
        arithmetic=arithmetic.displace,
        over={"copies over v": views_of("copies", "v")},
    ),
    Row(
        name="difference_",
        draw=draw_difference,
        forms={"plain": {}, "weight decay": {"decay": True}},
        gives=("out",),
        arithmetic=arithmetic.difference,
        minus=("minus",),
        over={"out over plus": views_of("plus", "out"), "out over minus": views_of("minus", "out")},
    ),
    Row(
        name="directional_products",
        draw=draw_directional,
        forms={"plain": {}},
        gives=("result",),
        arithmetic=arithmetic.directional,
        minus=("g0",),
    ),
    Row(
        name="gram",
        draw=draw_gram,
        forms={
            "with itself": {},
            **{f"with {rows} rows": {"other": rows} for rows in (1, 2, 5, 96)},
            "gate open": {"gate": 0.5},
            "gate shut": {"gate": 0.0, "other": 3},
            "weights": {"weighted": True, "gate": 1.0},
            "weights, with 5 rows": {"weighted": True, "other": 5},
        },
        gives=("result",),
        arithmetic=arithmetic.gram,
        counts=KRYLOV,
        dtypes=BUFFERS,
        segments=False,
    ),
    Row(
        name="combine_",
        draw=draw_combine,
        forms={
            "square": {},
            **{f"{columns} columns": {"columns": columns} for columns in (1, 4, 17, 128)},
            "gate open": {"gate": float("nan")},
            "gate shut": {"gate": 0.0},
        },
        gives=("out",),
        arithmetic=arithmetic.combine,
        over={"in place": first_rows},
        counts=KRYLOV,
        dtypes=BUFFERS,
        segments=False,
    ),
    Row(
        name="project_",
        draw=draw_project,
        forms={"plain": {}},
        gives=("w", "result"),
        arithmetic=arithmetic.project,
        minus=("coefficients",),
        counts=(0, *KRYLOV),
        dtypes=BUFFERS,
        segments=False,
    ),
    Row(
        name="benettin_",
        draw=draw_benettin,
        forms={
            "plain": {},
            "growth": {"estimate": 1, "ema": 0.9},
            "paper": {"estimate": 2, "sign": -1, "control": False},
            "schwarz": {"estimate": 3, "alternate": False},
            "secant": {"estimate": 4, "refined": 1.0},
            "outer": {"estimate": 5, "sign": -1, "momentum": 0.5},
            "realised": {"realised": True, "rotate": False},
            "realised, heavy": {"realised": True, "momentum": 0.5},
            "metric": {"metric": True},
        },
        gives=("state",),
        counts=tuple(COUNTS),
        dtypes=BUFFERS[1:],
        scalars=True,
    ),
    Row(
        name="benettin_refine_",
        draw=draw_refine,
        forms={"again": {}, "not again": {"again": 0.0}},
        gives=("state",),
        counts=tuple(COUNTS),
        dtypes=BUFFERS[1:],
        scalars=True,
    ),
]
TABLE: dict[str, Row] = {row.name: row for row in ROWS}
