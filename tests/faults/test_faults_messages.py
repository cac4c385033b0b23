"""Errors of the public API: of every wrong argument, its name and what is wrong, in a few words."""

from __future__ import annotations

import copy
import functools
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import lyapcuda
from lyapcuda.arguments import described

_MODEL = nn.Linear(3, 2)
_PARAMS = list(_MODEL.parameters())
_X, _BIG = torch.ones(4, 3), torch.ones(40, 40)


def loss() -> torch.Tensor:
    return _MODEL(_X).square().mean()


class Output(dict):
    """As a ModelOutput of transformers: a mapping that has its entries as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Plain:
    pass


def nothing() -> None:
    """A callable that returns no loss."""


def wrong_values() -> dict[str, Any]:
    """One of each kind that somebody passes; a repr would print tensors, or many characters."""
    sgd = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    return {
        "None": None,
        "text": "t" * 500,
        "number": -2.5,
        "NaN": math.nan,
        "Inf": math.inf,
        "tensor": _BIG,
        "tensors": [_BIG] * 50,
        "output": Output(loss=_BIG, logits=_BIG),
        "object": Plain(),
        "function": nothing,
        "module": nn.Linear(2, 2),
        "optimizer": sgd,
        "scheduler": torch.optim.lr_scheduler.StepLR(sgd, 1),
        "class": dict,
        "empty": [],
        "array": np.ones((40, 40)),
        "complex": 1j,
    }


class Entry(NamedTuple):
    """A call with one argument to get wrong; ``takes``: the kinds that are right."""

    where: str
    argument: str
    call: Callable[[Any], Any]
    takes: str = ""


def entries() -> Iterator[Entry]:
    """Every argument of the public entry points that can be checked."""
    # (With model=, nobody looks for modules.)
    tracker = functools.partial(lyapcuda.CurvatureTracker, model=_MODEL)
    operator = functools.partial(lyapcuda.HessianOperator, model=_MODEL)
    sgd, eigsh = lyapcuda.LyapunovSGD, functools.partial(lyapcuda.eigsh, model=_MODEL)
    optional = {"perturbation", "tol", "beta", "model", "difference", "select", "maxiter"}
    optional |= {"ncv", "v0"}

    def by_name(
        where: str, call: Callable[..., Any], names: str, more: str = ""
    ) -> Iterator[Entry]:
        extra = dict(pair.split(":") for pair in more.split())
        for name in names.split():
            takes = ("None " if name in optional else "") + extra.get(name, "").replace(",", " ")
            yield Entry(where, name, lambda value, n=name: call(**{n: value}), takes)

    measured = tracker(_PARAMS)
    measured.step(loss)
    optimizer = sgd(_PARAMS)
    h = operator(loss, _PARAMS)
    vectors = lyapcuda.eigsh(h)
    # What is tracked.
    yield Entry("CurvatureTracker", "params", tracker, "module optimizer")
    yield Entry("HessianOperator", "params", lambda v: operator(loss, v), "module optimizer")
    yield Entry("eigsh", "params", lambda v: eigsh(loss, v), "module optimizer")
    yield Entry("LyapunovSGD", "params", sgd, "empty tensors")  # (torch.optim says what is wrong)
    # The closure, and what it returns.
    for where, call in {
        "CurvatureTracker.step": measured.step,
        "CurvatureTracker.backward": measured.backward,
        "mode='exact'": tracker(_PARAMS, mode="exact").step,
        "eigsh": lambda c: eigsh(c, _PARAMS),
        "trace": lambda c: lyapcuda.trace(c, _PARAMS, model=_MODEL),
        "spectral_density": lambda c: lyapcuda.spectral_density(c, _PARAMS, model=_MODEL),
        "finite_scale": lambda c: lyapcuda.finite_scale(c, _PARAMS, torch.ones(1, 8), model=_MODEL),
        "LyapunovSGD.step": optimizer.step,
        "LyapunovSGD.measure": optimizer.measure,
    }.items():
        yield Entry(where, "closure", call, "module")  # (its own error)
        yield Entry(f"{where}, result", "closure", lambda v, call=call: call(lambda: v))
    yield Entry("LyapunovSGD.warmup", "closure", optimizer.warmup, "module empty")
    yield Entry(
        "backward",
        "measure",
        lambda v: measured.backward(loss, measure=v),
        "None function module class",
    )
    yield Entry(
        "attach",
        "measure",
        lambda v: tracker(_PARAMS).attach(torch.optim.SGD(_PARAMS), measure=v),
        "None function module class",
    )
    yield Entry(
        "backward",
        "batches",
        lambda v: measured.backward(lambda _: loss(), batches=v),
        "None tensors",
    )
    # Options.
    names = "k every perturbation which estimate tol iterations beta momentum weight_decay ema"
    yield from by_name(
        "CurvatureTracker",
        lambda **options: tracker(_PARAMS, **options),
        f"{names} history seed model mode",
        "model:module,empty,tensor,tensors",
    )
    names = "gain k every momentum weight_decay max_lr perturbation estimate decay ema seed"
    yield from by_name(
        "LyapunovSGD",
        lambda **options: sgd(_PARAMS, **options),
        f"{names} warmup_tol warmup_iterations",
        "estimate:None gain:None momentum:None warmup_iterations:None",
    )
    yield from by_name(
        "HessianOperator",
        lambda **options: operator(loss, _MODEL, **options),
        "mode difference perturbation select weight_decay model",
        "model:module,empty,tensor,tensors",
    )
    yield from by_name(
        "eigsh",
        lambda **options: lyapcuda.eigsh(h, **options),
        "k which tol maxiter method ncv v0 seed",
    )
    yield from by_name("trace", lambda **options: lyapcuda.trace(h, **options), "samples seed")
    yield Entry("finite_scale", "vectors", lambda v: lyapcuda.finite_scale(h, v))
    yield Entry(
        "finite_scale", "perturbations", lambda v: lyapcuda.finite_scale(h, vectors, v), "None"
    )
    yield Entry("matvec", "v", h.matvec)
    yield Entry("matmat", "matrix", h.matmat)
    yield Entry("unflatten", "i", vectors.unflatten)
    growth = lyapcuda.lyapunov.curvature_of_growth
    yield Entry("curvature_of_growth", "rate", lambda v: growth(1.0, v), "number")
    yield Entry("curvature_of_growth", "exponent", lambda v: growth(v, 1.0), "number")
    yield Entry("state_fields", "k", lyapcuda.ops.state_fields)
    # The rest of the tracker.
    yield Entry("attach", "optimizer", tracker(_PARAMS).attach, "optimizer")
    yield Entry("register_step_hook", "hook", measured.register_step_hook, "function module class")
    yield Entry("vector", "i", measured.vector)
    yield Entry("history", "after", measured.history)
    yield Entry("load_state_dict", "state_dict", measured.load_state_dict)
    saved = measured.state_dict()
    for part in ("format", "k", "which", "sizes", "calls", "gradients", "sizing", "refinement"):
        yield Entry(
            f"load_state_dict, {part}",
            "state_dict",
            lambda v, part=part: measured.load_state_dict({**saved, part: v}),
            "empty array" if part == "refinement" else "array",
        )
    # Files and batches.
    path = Path("never") / "made.csv"
    yield Entry("CurvatureLog", "tracker", lambda v: lyapcuda.CurvatureLog(v, path))
    yield Entry("CurvatureLog", "targets", lambda v: lyapcuda.CurvatureLog(measured, v))
    yield Entry("CurvatureLog", "mode", lambda v: lyapcuda.CurvatureLog(measured, path, mode=v))
    yield Entry("CurvatureLog", "every", lambda v: lyapcuda.CurvatureLog(measured, path, every=v))
    yield Entry("split_batch", "fraction", lambda v: lyapcuda.split_batch(_X, v))
    yield Entry("split_batch", "batch", lyapcuda.split_batch, "tensor tensors output")


def fault_of(error: BaseException, argument: str) -> str | None:
    """What is wrong with an error; None for nothing."""
    text = str(error)
    if not isinstance(error, TypeError | ValueError | RuntimeError | IndexError):
        return f"of another kind: {error!r:.200}"
    if sum(-(-len(line) // 100) for line in text.splitlines()) > 3:
        return f"too long: {text[:300]}"
    if "tensor(" in text or "array(" in text:
        return f"prints numbers: {text[:300]}"
    return None if argument in text else f"doesn't name {argument}: {text[:300]}"


@pytest.mark.filterwarnings("ignore")
def test_wrong_arguments_are_named_in_a_few_words():
    values, faults, count = wrong_values(), [], 0
    for entry in entries():
        for kind in [name for name in values if name not in entry.takes.split()]:
            what, count = f"{entry.where}({entry.argument}=<{kind}>)", count + 1
            try:
                entry.call(values[kind])
            except Exception as error:
                fault = fault_of(error, entry.argument)
                faults += [f"{what}: {fault}"] if fault else []
            else:
                faults.append(f"{what}: taken")
    assert not faults, "\n".join(faults)
    assert count > 1000


@pytest.mark.parametrize(
    "result, words",
    [
        (Output(loss=_BIG), "got <Output of 1>: return its .loss"),
        ({"loss": _BIG, "log": {}}, 'got <dict of 2>: return its ["loss"]'),
        ((_BIG, _BIG), "got <tuple of 2>: return the loss alone"),
        (None, "it returned None: end it with `return loss`"),
        (_BIG[0], "got shape (40,): return its mean() or sum()"),
        (np.float32(1), "got np.float32(1.0)"),
    ],
)
def test_what_to_return_instead_of_a_models_output(result, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        lyapcuda.CurvatureTracker(_PARAMS).step(lambda: result)
    assert words in str(caught.value)


def test_a_generator_that_was_used_up_is_named():
    params = _MODEL.parameters()
    lyapcuda.CurvatureTracker(params)
    with pytest.raises(ValueError, match="params: empty.*a generator gives its tensors once"):
        lyapcuda.CurvatureTracker(params)


def test_parameters_made_in_inference_mode_are_named_with_the_way_out():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    for make in (lyapcuda.CurvatureTracker, lambda p: lyapcuda.eigsh(loss, p)):
        with pytest.raises(ValueError, match="params: weight of .*inference_mode") as caught:
            make(model)
        assert fault_of(caught.value, "deepcopy") is None
    lyapcuda.CurvatureTracker(copy.deepcopy(model))  # the way out


def test_inside_of_inference_mode_nothing_is_evaluated():
    tracker, operator = lyapcuda.CurvatureTracker(_MODEL), lyapcuda.HessianOperator(loss, _MODEL)
    optimizer = lyapcuda.LyapunovSGD(nn.Linear(3, 2).parameters())
    for call, name in {
        tracker.step: "CurvatureTracker.step",
        tracker.backward: "CurvatureTracker.backward",
        optimizer.measure: "LyapunovSGD.measure",
        lambda c: lyapcuda.eigsh(c, _MODEL): "eigsh",
        lambda c: operator.matvec(torch.ones(8)): "HessianOperator.matvec",
    }.items():
        with torch.inference_mode(), pytest.raises(RuntimeError, match=name) as caught:
            call(loss)
        assert fault_of(caught.value, "inference_mode") is None
    assert float(tracker.steps) == 0
    tracker.step(loss)  # nothing of the state was made inside
    with torch.inference_mode(), torch.inference_mode(False):
        tracker.step(loss)
    assert float(tracker.steps) == 2


def test_a_modules_parameters_are_named_as_it_names_them():
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    tracker = lyapcuda.CurvatureTracker(model)
    with pytest.raises(TypeError, match="gradient of 0.weight"):
        tracker.step(lambda: model(torch.tensor([1])).sum())


@pytest.mark.parametrize(
    "value, words",
    [
        (0.5, "0.5"),
        ("LA", "'LA'"),
        ([1, 2], "[1, 2]"),
        ([[1, 2], [3]], "[[1, 2], [3]]"),
        ([1] * 500, "<list of 500>"),
        ("t" * 500, "'" + "t" * 58 + "…"),
        (torch.ones(2, 3), "<Tensor of shape (2, 3)>"),
        ([torch.ones(2)] * 3, "<list of 3>"),
        (nothing, "<function>"),
        (dict, "<class dict>"),
    ],
)
def test_a_value_in_a_few_words(value, words):
    assert described(value) == words


def test_an_unbuilt_clone_says_how_to_build_it(monkeypatch):
    """Without Python's own guess at the cause, a circular import."""
    monkeypatch.delattr(lyapcuda, "_C")
    monkeypatch.delitem(sys.modules, "lyapcuda._C")
    monkeypatch.setattr(lyapcuda, "__path__", [])
    monkeypatch.setattr(sys, "meta_path", [])  # (an editable install's finder would find it)
    monkeypatch.setattr(lyapcuda.__spec__, "_initializing", True)
    with pytest.raises(ImportError, match="circular"):
        from lyapcuda import _C  # noqa: F401
    with pytest.raises(ImportError, match="isn't built here.*: run `pip install") as caught:
        runpy.run_path(lyapcuda.extension.__file__)
    shown = "".join(traceback.format_exception(caught.value))
    assert "circular" not in shown and "--no-build-isolation --editable ." in shown
