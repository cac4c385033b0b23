"""A loss whose Hessian is wanted: a model, its data and its loss function, each by name."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lyapcuda.command.weights import load_weights

__all__ = ["LOSSES", "OWN", "Problem", "from_names", "mse", "resolve"]


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of ``(n, classes)`` against the one-hot code of int64 ``(n,)`` labels, or
    against targets of the outputs' own shape.

    Raises:
        ValueError: targets of another shape.
    """
    if not targets.dtype.is_floating_point:
        targets = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"loss=mse: outputs of shape {tuple(outputs.shape)}, targets {tuple(targets.shape)}"
        )
    return F.mse_loss(outputs, targets)


#: By name: of (outputs, targets).
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": F.cross_entropy, "mse": mse}
#: The name of a model's own loss, as those of Hugging Face return it.
OWN = "model"


@dataclass(frozen=True)
class Problem:
    """loss(model(inputs), targets) of all ``batches`` of (inputs, targets) together; or the
    model's own loss, model(**batch).loss of batches that are dicts.

    Attributes:
        model, batches: the parts.
        loss: None for the model's own.
        weight_decay: counts as part of the loss.
        names: what each part was called, for reports.
        device: where a batch is taken before the model sees it.
        sizes: how much each batch counts, as of `HessianOperator`.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor] | None
    batches: Iterable[Any]
    weight_decay: float
    names: dict[str, str]
    device: str = "cpu"
    sizes: Any = None

    def closure(self, batch: Any) -> Tensor:
        """The loss of one batch."""
        if self.loss is None:
            return self._own_loss(batch)
        if isinstance(batch, Mapping):
            raise ValueError(
                f"data: batches are dicts: loss={OWN} takes the model's own loss, "
                "any other batches of (inputs, targets)"
            )
        try:
            inputs, targets = batch
        except (TypeError, ValueError):
            raise ValueError(
                f"data: expected batches of (inputs, targets), got a {type(batch).__name__}"
            ) from None
        return self.loss(self.model(_to(inputs, self.device)), _to(targets, self.device))

    def _own_loss(self, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"data: expected dicts for loss={OWN}, which are passed to the model by name; got "
                f"a {type(batch).__name__}"
            )
        outputs = self.model(**_to(batch, self.device))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        loss = getattr(outputs, "loss", None) if loss is None else loss
        if loss is None:
            raise ValueError(
                f"loss={OWN}: the model returned a {type(outputs).__name__} without a loss; do the "
                f"batches have labels? They have {', '.join(map(str, batch))}"
            )
        return loss


def _to(value: Any, device: str) -> Any:
    """A tensor on a device; so the tensors of a list, a tuple or a dict."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to(item, device) for item in value)
    return value


def resolve(argument: str, path: str) -> Any:
    """The object that ``package.module:name`` or ``folder/file.py:name`` names.

    Raises:
        ValueError: there is none; names ``argument`` and the path.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ValueError(f"{argument}={path!r}: expected package.module:name or file.py:name")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, name)
        if os.getcwd() not in sys.path:  # a console script's path lacks it
            sys.path.insert(0, os.getcwd())
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ValueError(f"{argument}={path!r}: can't be loaded: {error}") from error


def _called(argument: str, path: str, options: Mapping[str, Any]) -> Any:
    factory = resolve(argument, path)
    if not callable(factory):
        raise ValueError(f"{argument}={path!r}: a {type(factory).__name__}, expected a function")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ValueError(f"{argument}={path!r}: can't be called so: {error}") from error
    return factory(**options)


def from_names(
    model: str,
    data: str,
    loss: str = "ce",
    *,
    weights: Path | None = None,
    weights_key: str | None = None,
    weight_decay: float = 0.0,
    device: str = "cpu",
    sizes: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
) -> Problem:
    """Puts a problem together.

    Args:
        model: ``package.module:factory``, a function that returns a module, in the mode that
            it is to be measured in.
        data: ``package.module:factory``, a function that returns an iterable of (inputs,
            targets), the same at every pass; with the model's own loss, of dicts.
        loss: ``ce``, ``mse`` or ``package.module:function`` of (outputs, targets); ``model`` for
            the model's own.
        weights: a checkpoint for the model, as `load_weights` takes it.
        weights_key: where in it the weights are.
        weight_decay: counts as part of the loss.
        device: a torch device for the model and every batch.
        sizes: how much each batch counts: ``sum``, or ``package.module:function`` of a batch.
        model_options, data_options: by name, what the factories are called with.

    Raises:
        ValueError, OSError: naming the argument and its value.
    """
    if weights is None and weights_key is not None:
        raise ValueError(f"weights_key={weights_key!r}: it is a checkpoint's; give its path, too")
    module = _called("model", model, model_options or {})
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model={model!r}: returned a {type(module).__name__}, expected a torch.nn.Module"
        )
    if weights is not None:
        load_weights(module, weights, weights_key)
    named = {OWN: None, **LOSSES}
    loss_of = named[loss] if loss in named else resolve("loss", loss)
    names = {"model": model, "data": data, "loss": loss}
    batches = _called("data", data, data_options or {})
    size_of = sizes if sizes in (None, "sum") else resolve("sizes", sizes)
    return Problem(module.to(device), loss_of, batches, weight_decay, names, device, size_of)
