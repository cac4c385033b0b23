"""What a closure refers to: the objects in its cells, defaults, bound arguments and globals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

__all__ = ["code_of", "instances_in", "named_objects"]

Kind = TypeVar("Kind")

#: How many functions deep a closure is followed, and at most how many functions.
_DEPTH, _MOST = 4, 200
#: Functions of these packages refer to nothing of the user's own.
_LIBRARIES = ("torch", "numpy", "lyapcuda")


def code_of(function: Callable[..., Any], depth: int = _DEPTH) -> Hashable:
    """What tells one closure's text from another's: a loop that makes it anew gives the same."""
    if isinstance(function, functools.partial):
        arguments = (*function.args, *function.keywords.values())
        codes = tuple(code_of(a, depth) for a in arguments if callable(a))
        return (code_of(function.func, depth), *codes) if codes else code_of(function.func, depth)
    if isinstance(function, MethodType):
        return code_of(function.__func__, depth)
    wrapped = getattr(function, "__wrapped__", None)
    if callable(wrapped):
        return code_of(wrapped, depth)
    code = getattr(function, "__code__", type(function))
    # What a decorator has wrapped tells its closures apart, whose own text is one.
    inside = [value for _, value in _cells(function)] if depth else []
    kinds = FunctionType | MethodType | functools.partial
    codes = tuple(code_of(value, depth - 1) for value in inside if isinstance(value, kinds))
    return (code, *codes) if codes else code


def named_objects(closure: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Every object that a closure refers to by a name of its own, with the name."""
    seen: set[int] = set()
    left: list[tuple[Any, int]] = [(closure, _DEPTH)]
    while left and len(seen) < _MOST:
        function, depth = left.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for name, value in _referred(function):
            if isinstance(value, ModuleType | type | BuiltinFunctionType):
                continue
            if isinstance(value, FunctionType | MethodType | functools.partial):
                yield name, value
                root = (getattr(value, "__module__", None) or "").split(".")[0]
                if depth and root not in _LIBRARIES:
                    left.append((value, depth - 1))
                continue
            yield name, value


def _referred(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        yield "partial", function.func
        yield from ((f"argument {i}", value) for i, value in enumerate(function.args))
        yield from function.keywords.items()
    elif isinstance(function, MethodType):
        yield "self", function.__self__
        yield function.__name__, function.__func__
    elif isinstance(function, FunctionType):
        code = function.__code__
        yield from _cells(function)
        names = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
        yield from (function.__kwdefaults__ or {}).items()
        there = function.__globals__
        yield from ((name, there[name]) for name in code.co_names if name in there)
    elif callable(function):
        yield "self", function


def _cells(function: Any) -> Iterator[tuple[str, Any]]:
    """The variables of functions around a function that it uses."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def instances_in(name: str, value: Any, kind: type[Kind]) -> Iterator[tuple[str, Kind]]:
    """What of a kind an object is, or holds in its attributes or as members, with names."""
    if isinstance(value, kind):
        yield name, value
        return
    if isinstance(value, dict):
        some = islice(value.items(), _MOST)
        inside = [(f"{name}[{key!r:.20}]", member) for key, member in some]
    elif isinstance(value, list | tuple):
        inside = [(f"{name}[{i}]", member) for i, member in enumerate(value[:_MOST])]
    else:
        there = getattr(value, "__dict__", None)
        inside = [(f"{name}.{n}", member) for n, member in (there or {}).items()]
    yield from ((called, found) for called, found in inside if isinstance(found, kind))
