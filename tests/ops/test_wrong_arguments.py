"""Wrong arguments of every op: a RuntimeError that names the argument, and nothing has changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import simt_library
from lyapcuda import ops
from op_arithmetic import Arguments
from op_inputs import BF16, F16, F64, cloned, number, tensors_of
from op_table import ROWS, TABLE, Row, assert_same

NAN, INF = math.nan, math.inf


def fullest(row: Row) -> str:
    """The form with most arguments."""
    return max(row.forms, key=lambda form: len(row.arguments(row.inputs([1]), form)))


def good(row: Row, form: str | None = None) -> Arguments:
    k = 3 if 3 in row.counts else 1
    inputs = row.inputs([10, 12], k, *row.dtypes[0], gap=8)
    return row.arguments(inputs, fullest(row) if form is None else form)


def forms_of_all(row: Row) -> dict[str, list[str]]:
    """The fullest form, then others for arguments that exclude those: each with what it adds."""
    found: dict[str, list[str]] = {}
    for form in [fullest(row), *row.forms]:
        seen = {name for names in found.values() for name in names}
        if more := [name for name in good(row, form) if name not in seen]:
            found[form] = more
    return found


def check_refused(row: Row, arguments: Arguments, message: str) -> None:
    before = cloned(arguments)
    with pytest.raises(RuntimeError, match=message):
        row.call(arguments)
    assert_same(arguments, before, exact=False)


# --- what every argument of a kind has to be -----------------------------------------------------

#: What each may have any number of, or any shape.
ANY_SIZE = {"losses"}


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], dim=-1)


def strided(t: Tensor) -> Tensor:
    spread = t.new_zeros((*t.shape, 2))
    spread[..., 0] = t
    return spread[..., 0]


def wrong_tensors(name: str, t: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """(what is wrong, a tensor, the message) for one that the op takes."""
    numbers = t.dtype == F64
    contiguous = rf"{name}: expected a contiguous"
    if numbers:
        yield "dtype", t.float(), rf"{contiguous} float64"
    else:
        yield "dtype", t.int(), rf"{name}: (expected float32 or float64|dtype)"
        yield (
            "another buffer's dtype",
            t.double(),
            rf"\b{name}: dtype|: dtype .* (differs from {name}'s|Double buffer)",
        )
    if t.numel() > 1:
        yield "strided", strided(t), contiguous
    if t.dim() == 2:
        yield "transposed", t.T.contiguous().T, contiguous
        yield "flat", t.flatten(), rf"{name}: expected"
        more = torch.cat([t, t[:1]])
        yield (
            "another row",
            more,
            rf"\b{name}\b.*(rows|expected)|rows, but {name} has|: expected \d",
        )
        if not numbers:
            yield (
                "too many rows",
                t.new_zeros(129, t.shape[1]),
                rf"\b{name}\b.* 129 rows|{name} has",
            )
            yield "no rows", t[:0], rf"\b{name}\b.* 0 rows|rows, but {name} has|{name}: expected"
    elif not numbers:
        yield "a row", t[None], contiguous
    if name not in ANY_SIZE:
        yield "longer", longer(t), rf"\b{name}\b.*(elements|rows|expected)|but {name} has"


def wrong_lists(name: str, tensors: list[Tensor]) -> Iterator[tuple[str, list[Tensor], str]]:
    first, last = tensors
    yield "count", [first], rf"{name}: 1 tensors|tensors, but {name} has"
    yield "size", [first, longer(last)], r"\[1\]: .*elements|offsets\[1\]"
    yield "dtype", [t.int() for t in tensors], r"\[0\]: dtype"
    yield "wide", [t.double() for t in tensors], r"\[0\]: dtype|: dtype .* differs"
    yield "mixed", [first, last.to(BF16)], rf"{name}\[1\]: dtype"
    yield "narrow", [t.to(F16) for t in tensors], r"\[0\]: dtype|: dtype .* differs"
    yield "strided", [first, strided(last)], rf"{name}\[1\]: expected a contiguous"


def wrong_offsets(offsets: list[int]) -> Iterator[tuple[str, list[int], str]]:
    first, last = offsets
    yield "negative", [-1, last], r"offsets\[0\]: -1"
    yield "beyond", [first, 10**6], r"offsets\[1\]: 1000000"
    yield "huge", [first, 2**63 - 1], r"offsets\[1\]: "
    yield "inside", [first, first + 9], r"offsets\[1\]: "
    yield "count", [*offsets, 40], "offsets has 3"


def wrong_kinds(arguments: Arguments, names: list[str]):
    for name in names:
        value = arguments[name]
        if name == "offsets":
            found = wrong_offsets(value)
        elif isinstance(value, Tensor):
            found = wrong_tensors(name, value)
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            found = wrong_lists(name, value)
        else:
            continue
        for what, wrong, message in found:
            yield f"{name} {what}", {name: wrong}, message


#: Of these, what is not wrong.
RIGHT = {
    *(("gram", f"{name} another row") for name in "ab"),
    # Nothing else says how long these are.
    *(("recenter_", "theta size"), ("descend_", "buffer longer"), ("displace_", "v longer")),
    ("directional_products", "u longer"),
    ("project_", "v no rows"),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_wrong_kind_of_argument_is_named(backend, row):
    tried = 0
    for form, names in forms_of_all(row).items():
        row.call(good(row, form))
        for what, wrong, message in wrong_kinds(good(row, form), names):
            if (row.name, what) not in RIGHT:
                try:
                    check_refused(row, good(row, form) | wrong, message)
                except (AssertionError, pytest.fail.Exception) as error:
                    raise AssertionError(f"{row.name}, {what}: {error}") from None
                tried += 1
    assert tried >= 5


# --- ranges, pairs, memory that is shared --------------------------------------------------------


def without(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda a: dict.fromkeys(names)


def overlapping(written: str, read: str) -> Callable[[Arguments], Arguments]:
    """The rows of the one start at the second of the other's."""

    def wrong(a: Arguments) -> Arguments:
        k, n = a[written].shape
        rows = a[written].new_zeros(2 * k, n)
        return {read: rows[:k], written: rows[1 : k + 1]}

    return wrong


def of_another_dtype(written: str, read: str, lists: str) -> Callable[[Arguments], Arguments]:
    """One of 16 bits begins where another of 32 does."""

    def wrong(a: Arguments) -> Arguments:
        wide, narrow = (written, read) if written == "d" else (read, written)
        half = a[wide].view(-1).view(BF16)[: a[wide].numel()].view(a[wide].shape)
        others = {name: [t.to(BF16) for t in a[name]] for name in lists.split()}
        return {narrow: half, **others}

    return wrong


def beside_metric(written: str) -> Callable[[Arguments], Arguments]:
    """A metric that lies in what is written, without momentum."""
    gone = {"p": None, "p_next": None}
    return lambda a: {
        **gone,
        **({"momentum": 0.0} if "momentum" in a else {}),
        "metric": a[written][0],
    }


def with_metric(a: Arguments) -> Arguments:
    return {"metric": torch.ones(a["q"].shape[1])}


def rows_of_panel(a: Arguments, out: slice, panel: slice, **more) -> Arguments:
    rows = torch.zeros(6, a["panel"].shape[1])
    return {"out": rows[out], "panel": rows[panel], **more}


RATES = {
    "gain": ({"gain": -1.0}, "gain: expected a number of at least 0"),
    "gain nan": ({"gain": NAN}, "gain: expected a number"),
    "gain inf": ({"gain": INF}, "gain: expected a number"),
    "max_lr negative": ({"max_lr": -1.0}, "max_lr: expected a positive"),
    "max_lr zero": ({"max_lr": 0.0}, "max_lr: expected a positive"),
    "max_lr inf": ({"max_lr": INF}, "max_lr: expected a positive"),
}
STEP = {
    "momentum one": ({"momentum": 1.0}, "momentum: expected"),
    "momentum large": ({"momentum": 1.5}, "momentum: expected"),
    "momentum alone": (without("buffer", "offsets"), "momentum, nesterov: they need a buffer"),
    "nesterov alone": (
        lambda a: {"nesterov": True, "momentum": 0.0, "buffer": None, "offsets": None},
        "momentum, nesterov: they need a buffer",
    ),
}
KEEP_OFFSETS = {
    name: (lambda a, wrong=wrong: {**wrong(a), "offsets": a["offsets"]}, message)
    for name, (wrong, message) in list(STEP.items())[2:]
}
COUNTED = {
    "k small": ({"k": 0}, "k: expected 1 to 32, got 0"),
    "k large": ({"k": 33}, "k: expected 1 to 32, got 33"),
    "k other": ({"k": 2}, "state: expected 40 elements, got 60"),
}
WRONG = {
    "ascent_": {
        "sign": ({"sign": 0}, "sign: expected 1"),
        "p alone": (without("p_next"), "p, p_next: give both"),
        "p_next alone": (without("p"), "p, p_next: give both"),
        "momentum alone": (without("p", "p_next"), "momentum: 0.5 needs p and p_next"),
        "state of another k": ({"state": ops.new_state("cpu", 2)}, "state: expected 60 elements"),
        "metric and p": (with_metric, "metric: momentum isn't offered with it"),
        "metric in d": (beside_metric("d"), "d: shares memory with metric"),
        "d in q": (overlapping("d", "q"), "d: shares memory with q"),
        "d in g1": (overlapping("d", "g1"), "d: shares memory with g1"),
        "d in p": (overlapping("d", "p"), "d: shares memory with p"),
        "p_next in p": (overlapping("p_next", "p"), "p_next: shares memory with p"),
        "d over g1 of another dtype": (
            of_another_dtype("d", "g1", "g0 theta"),
            "d: shares memory with g1, but is not the same elements",
        ),
    },
    "recenter_": {
        "p alone": (without("p_next"), "p, p_next: give both"),
        "p_next alone": (without("p"), "p, p_next: give both"),
        "state of another k": ({"state": ops.new_state("cpu", 4)}, "state: expected 60 elements"),
        "metric and p": (with_metric, "metric: momentum isn't offered with it"),
        "metric in q": (beside_metric("q"), "q: shares memory with metric"),
        "metric in copies": (beside_metric("copies"), "copies: shares memory with metric"),
        "q is d": (lambda a: {"q": a["d"]}, "q: shares memory with d"),
        "q in d": (overlapping("q", "d"), "q: shares memory with d"),
        "q is copies": (lambda a: {"q": a["copies"]}, "q: shares memory with copies"),
        "p is p_next": (lambda a: {"p": a["p_next"]}, "p: shares memory with p_next"),
        "copies in d": (overlapping("copies", "d"), "copies: shares memory with d"),
        "copies of another dtype in d": (
            of_another_dtype("copies", "d", "theta"),
            "copies: shares memory with d, but is not the same elements",
        ),
    },
    "reseed_": {
        "panel in p": (lambda a: {"p": a["panel"]}, "p: shares memory with panel"),
        "dim": (lambda a: {"panel": a["panel"][None]}, "panel: expected a contiguous 2-D tensor"),
        "state of another k": ({"state": ops.new_state("cpu", 2)}, "state: expected 60 elements"),
        "elements": ({"elements": 0}, "elements: expected at least 1, got 0"),
        "counts": ({"sizes": [1]}, "sizes: 1 entries, but offsets has 2"),
        "beyond": ({"sizes": [5, 46]}, r"offsets\[1\]: .* 46 elements don't fit a buffer of"),
        "negative": ({"sizes": [-1, 5]}, r"offsets\[0\]"),
    },
    "slopes_": {
        **dict(list(STEP.items())[:2]),
        **KEEP_OFFSETS,
        "state of another k": ({"state": ops.new_state("cpu", 2)}, "state: expected"),
    },
    "descend_": {
        **RATES,
        **STEP,
        "buffer alone": (without("offsets"), "buffer, offsets: give both"),
        "panel alone": (lambda a: {"panel": a["buffer"][None]}, "panel, slopes: give both"),
        "slopes alone": ({"slopes": number(1.0)}, "panel, slopes: give both"),
    },
    "descend_, along vectors": {
        **RATES,
        **KEEP_OFFSETS,
        "panel alone": (without("slopes"), "panel, slopes: give both"),
        "slopes alone": (without("panel"), "panel, slopes: give both"),
        "no offsets": (without("offsets"), "offsets: panel needs them"),
        "state of another k": ({"state": ops.new_state("cpu", 2)}, "state: expected"),
    },
    "difference_": {"no v": (without("v"), "weight_decay: 0.0371 needs v")},
    "combine_": {
        "matrix shape": ({"matrix": torch.zeros(4, 3, dtype=F64)}, "matrix: expected 3 x"),
        "out overlaps": (
            lambda a: rows_of_panel(a, slice(1, 4), slice(0, 3), matrix=torch.eye(3, dtype=F64)),
            "out: shares memory with panel",
        ),
        "out shifted": (
            lambda a: rows_of_panel(a, slice(0, 3), slice(2, 5), matrix=torch.eye(3, dtype=F64)),
            "out: shares memory with panel",
        ),
        "out longer": (
            lambda a: rows_of_panel(
                a, slice(0, 4), slice(0, 3), matrix=torch.zeros(3, 4, dtype=F64)
            ),
            "out: shares memory with panel.*4 rows, panel has 3",
        ),
    },
    "project_": {"w in v": (lambda a: {"w": a["v"][2]}, "w: shares memory with v")},
    "benettin_": {
        **COUNTED,
        "sign": ({"sign": 0}, "sign: expected 1"),
        "estimate": ({"estimate": -1}, "estimate: expected 0 to 5, got -1"),
        "estimate large": ({"estimate": 6}, "estimate: expected 0 to 5, got 6"),
        **{
            f"{name} {value}": ({name: value}, f"{name}: expected")
            for name in ("momentum", "ema")
            for value in (1.0, -0.1, 1.5, NAN)
        },
        "gram realised": ({"realised": True}, "gram: expected 9 x 9"),
        "gram momentum": ({"momentum": 0.5}, "gram: expected 9 x 9"),
    },
    "benettin_refine_": COUNTED,
}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, wrongs in WRONG.items() for wrong in wrongs]
)
def test_wrong_arguments_are_named(backend, name, wrong):
    values, message = WRONG[name][wrong]
    row = TABLE[name]
    a = good(row)
    check_refused(row, a | (values(a) if callable(values) else values), message)


# --- devices -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=simt_library.HERE)
def library(request):
    """(ops of a CUDA backend, where its tensors are, another device whose tensors reach them)."""
    if request.param == "cuda":
        yield torch.ops.lyapcuda, "cuda", "cpu"
        return
    # Tensors on "meta" would be stopped by the dispatcher; hand them on to the checks.
    namespace = simt_library.simt()
    through = torch.library.Library("lyapcuda_simt", "IMPL", "Meta")
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in {row.op for row in ROWS}:
        op = getattr(namespace, name).default
        through.impl(name, functools.partial(op.redispatch, cpu))
    yield namespace, "cpu", "meta"
    through._destroy()


def moved(value, device):
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_tensor_on_another_device_is_named(library, row):
    namespace, here, elsewhere = library
    for form, names in forms_of_all(row).items():
        arguments = {name: moved(value, here) for name, value in good(row, form).items()}
        for name in names:
            value = arguments[name]
            for i in range(len(list(tensors_of(value)))):
                wrong = moved(value, elsewhere) if isinstance(value, Tensor) else list(value)
                if isinstance(wrong, list):
                    wrong[i] = moved(wrong[i], elsewhere)
                with pytest.raises(RuntimeError, match=rf"{name}(\[{i}\])?: expected a "):
                    getattr(namespace, row.op)(**arguments | {name: wrong})
