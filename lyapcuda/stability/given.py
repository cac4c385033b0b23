"""A diagonal P that a user gives: as a function of a parameter, or as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lyapcuda.arguments import described
from lyapcuda.params.collect import TrackedParameter
from lyapcuda.params.shards import shard_of

__all__ = ["Given"]


class Given:
    """P as a user gives it.

    Args:
        source: a function of a parameter, or a sequence of as many tensors as there are
            parameters, in their order. A P has a parameter's shape, or one that broadcasts to it.
        parameters: the tracked ones.
        argument: what the user calls it, for messages.

    Raises:
        TypeError: neither of the two.
        ValueError: a sequence of another length.
    """

    def __init__(
        self,
        source: Callable[[Tensor], Tensor] | Sequence[Tensor],
        parameters: Sequence[TrackedParameter],
        argument: str,
    ) -> None:
        self._source, self._parameters, self._argument = source, parameters, argument
        self._checked = False
        if callable(source):
            return
        if not isinstance(source, Sequence) or isinstance(source, str):
            raise TypeError(
                f"{argument}={described(source)}: expected an optimizer, a function of a parameter "
                "that returns its diagonal P,\nor a sequence of such tensors in the parameters' "
                "order"
            )
        if len(source) != len(parameters):
            raise ValueError(
                f"{argument}={described(source)}: expected a tensor for each of the "
                f"{len(parameters)} parameters"
            )

    def write_(self, views: Sequence[Tensor]) -> None:
        """Writes each parameter's P. The first time it is read back, to check it.

        Args:
            views: where to, shaped like this rank's part of every parameter.

        Raises:
            TypeError: a P that is no dense tensor of real numbers.
            ValueError: one of another shape; one with a value that isn't finite and above 0.
        """
        for number, (view, parameter) in enumerate(zip(views, self._parameters, strict=True)):
            tensor = parameter.tensor
            found = self._source(tensor) if callable(self._source) else self._source[number]
            view.copy_(shard_of(self._whole(found, parameter), tensor))
            if not self._checked and not bool(((view > 0) & view.isfinite()).all()):
                raise ValueError(
                    f"{self._argument}: the diagonal P of {parameter.name} has values that aren't "
                    "finite and above 0"
                )
        self._checked = True

    def _whole(self, found: Any, parameter: TrackedParameter) -> Tensor:
        """A P in the shape of its parameter."""
        what = f"{self._argument}: the diagonal P of {parameter.name} is {described(found)}"
        if not isinstance(found, Tensor) or found.layout != torch.strided or found.is_complex():
            raise TypeError(f"{what}; expected a dense tensor of real numbers")
        shape = parameter.tensor.shape
        if found.shape == shape:
            return found.detach()
        try:
            return found.detach().expand(shape)
        except RuntimeError:
            raise ValueError(
                f"{what}; expected the parameter's shape {tuple(shape)}, or one that broadcasts "
                "to it"
            ) from None
