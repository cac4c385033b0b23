"""A model's weights from a checkpoint, in the layouts that trainers leave behind."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lyapcuda.extras import require

__all__ = ["load_weights"]

#: Under which a checkpoint may hold its model's state_dict: the first that it has.
NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
#: What torch.compile, FSDP and activation checkpointing put into names, at any place.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
#: What a folder of save_pretrained, of a Trainer or of Accelerate may hold.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Found beside weights so often that they are read, too: making one runs nothing of the file's.
#: Where a name moved between versions, both are here.
HARMLESS = [
    argparse.Namespace,
    *((type(Path()), f"{place}.PosixPath") for place in ("pathlib", "pathlib._local")),
    *(
        (made, f"{place}.multiarray.{made.__name__}")
        for made in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
        for place in ("numpy.core", "numpy._core")
    ),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("?", "i4", "i8", "u1", "f2", "f4", "f8")},
]


def load_weights(module: nn.Module, path: Path, key: str | None = None) -> None:
    """Load a checkpoint's weights, without running what is in it.

    Args:
        module: takes them.
        path: of a ``.safetensors`` file, of what torch.save wrote, of an index of several such
            files, or of a folder of save_pretrained. It holds a state_dict, or a dict that has
            one as "state_dict" (as Lightning's .ckpt), "model_state_dict", "model", ... Wrappers
            may have changed the names (``module.``, ``_orig_mod.``); so may a trainer that holds
            the model as an attribute (``model.``).
        key: where in the checkpoint the weights are: a dict's key ("ema"), or what the names begin
            with ("ema_model"). None finds out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be read, or is another model's: says which names or shapes differ.
    """
    found = {_own_name(n): value for n, value in _state_dict(path, key).items()}
    wanted = module.state_dict(keep_vars=True)
    weights = _as_named(found, wanted, path)
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            _check(path, name, weights[name], value)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the model doesn't take them: {error}") from error


def _state_dict(path: Path, key: str | None) -> dict[str, Any]:
    """What a file holds, taken out of the dicts around it."""
    found = _read(path)
    while isinstance(found, Mapping):
        inner = None
        if key is not None:
            inner = _at(found, key)
            key = None if inner else key
        inner = inner or next((found[n] for n in NESTED if isinstance(found.get(n), Mapping)), None)
        if inner is None:
            break
        found = inner
    if isinstance(found, nn.Module):  # where its classes were allowed
        found = found.state_dict()
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: a {type(found).__name__}, expected a state_dict")
    if key is not None:
        raise ValueError(f"{path}: nothing under {key!r}; it has {_some(found)}")
    if not any(isinstance(value, Tensor) for value in found.values()):
        has = _some(found)
        advice = f"it has {has}: choose by --weights-key" if has else "it is empty"
        raise ValueError(f"{path}: no weights where they mostly are; {advice}")
    return dict(found)


def _at(found: Mapping[Any, Any], key: str) -> Mapping[Any, Any] | None:
    """What a dict has under a key, or under names that begin with it."""
    if isinstance(found.get(key), Mapping):
        return found[key]
    names = [name for name in found if isinstance(name, str) and name.startswith(f"{key}.")]
    return {name.removeprefix(f"{key}."): found[name] for name in names} or None


def _read(path: Path) -> Any:
    """What is in a file, or in the files that a folder or an index names."""
    if path.is_dir():
        path = _file_of(path)
    if not path.name.endswith(".index.json"):
        return _read_file(path)
    found: dict[Any, Any] = {}
    for part in _parts(path):
        found.update(_read_file(part))
    return found


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        load = require("safetensors.torch", f"--weights {path}").load_file
    else:
        load = _torch_load
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: can't be read as weights: {_reason(path, error)}") from error


def _torch_load(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
        warnings.simplefilter("ignore")  # of a TorchScript archive, which then fails
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, and what to do."""
    told = " ".join(str(error).split())
    if path.suffix == ".safetensors":
        return told
    if "TorchScript" in told:
        return "it is a TorchScript archive; save model.state_dict()"
    if isinstance(error, pickle.UnpicklingError):
        with torch.serialization.safe_globals(HARMLESS):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if others:
            return (
                f"beside weights it holds objects ({_some(others)}), and reading those can run "
                "code; save model.state_dict() alone, or allow them where your model is made: "
                "torch.serialization.add_safe_globals([...])"
            )
    return "it is cut off, or not what torch.save writes"


def _file_of(folder: Path) -> Path:
    """The file of weights in a folder."""
    if (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder}: written by torch.distributed.checkpoint; make a file of it first: python "
            f"-m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: a folder without {', '.join(FILES[::2])}")
    return found


def _parts(index: Path) -> list[Path]:
    """The files of an index of ``{"weight_map": {name: file}}``."""
    try:
        files = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return [index.parent / file for file in sorted(set(files))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of weights: {error!r}") from error


def _own_name(name: str) -> str:
    """A parameter's name as it is without wrappers."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name


def _as_named(found: dict[str, Any], wanted: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The weights under the model's own names, where a prefix is all that is between.

    A parameter of several names needs one of them only: safetensors has it once.

    Raises:
        ValueError: names are missing, or more than there should be.
    """
    alike: dict[Any, list[str]] = {}
    for name, value in wanted.items():
        same = id(value) if isinstance(value, Tensor) else name
        alike.setdefault(same, []).append(_own_name(name))
    first = {own: owns[0] for owns in alike.values() for own in owns}

    prefix = _prefix(found, first, path)
    inside = {n.removeprefix(prefix): v for n, v in found.items() if n.startswith(prefix)}
    missing = [owns[0] for owns in alike.values() if not inside.keys() & set(owns)]
    more = inside.keys() - first.keys()
    if missing or more:
        told = [f"it lacks {_some(missing)}"] * bool(missing)
        told += [f"it has {_some(more)}, which the model hasn't"] * bool(more)
        raise ValueError(f"{path}: not this model's weights: {'; '.join(told)}")
    outside = [name for name in found if not name.startswith(prefix)]
    if outside:
        warnings.warn(f"{path}: only {prefix}* is read, not {_some(outside)}", stacklevel=3)

    values = {}
    for owns in alike.values():
        there = [own for own in owns if own in inside]
        values |= dict.fromkeys(owns, inside[there[0]])
        if any(not _same(inside[there[0]], inside[own]) for own in there[1:]):
            raise ValueError(
                f"{path}: not this model's weights: {_some(there)} differ, and are one parameter "
                "in the model"
            )
    return {name: values[_own_name(name)] for name in wanted}


def _prefix(found: Mapping[str, Any], first: Mapping[str, str], path: Path) -> str:
    """What stands before the model's own names in a checkpoint: mostly nothing.

    Args:
        found: by the checkpoint's names.
        first: of each of the model's names, the first that the same parameter has.
    """
    covered: dict[str, set[str]] = {"": set()}
    for name in found:
        parts = name.split(".")
        for at in range(len(parts)):
            own = ".".join(parts[at:])
            if own in first:
                covered.setdefault(name.removesuffix(own), set()).add(first[own])
    whole = len(set(first.values()))
    complete = [prefix for prefix, names in covered.items() if len(names) == whole]
    if not complete:  # the nearest, for the message
        return max(covered, key=lambda prefix: len(covered[prefix]))
    if "" in complete:
        return ""
    if len(complete) > 1:
        keys = ", ".join(prefix.removesuffix(".") for prefix in sorted(complete))
        raise ValueError(f"{path}: several such models; choose by --weights-key: {keys}")
    return complete[0]


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other)
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))


def _check(path: Path, name: str, found: Any, wanted: Tensor) -> None:
    """Raises a ValueError unless a value can stand for the model's."""
    if not isinstance(found, Tensor):
        has, should = f"is a {type(found).__name__}", "is a tensor"
    elif not is_lazy(wanted) and found.shape != wanted.shape:
        has, should = f"has shape {tuple(found.shape)}", f"{tuple(wanted.shape)}"
    elif wanted.is_floating_point() and not found.is_floating_point():
        has, should = f"is of {found.dtype}", f"of {wanted.dtype}"
    else:
        return
    raise ValueError(f"{path}: not this model's weights: {name} {has}, the model's {should}")


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first of several names, in order, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
