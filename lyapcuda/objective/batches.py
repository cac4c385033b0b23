"""A data set streamed in minibatches, as often as gradients are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lyapcuda.arguments import described
from lyapcuda.objective.splitting import batch_size

__all__ = ["Batches"]


class Batches:
    """A data set streamed in minibatches, again for every evaluation.

    Args:
        data: an iterable that starts anew each time: a DataLoader, a list of batches.
        lengths: whether batches are measured; otherwise each counts as one sample.

    Raises:
        TypeError: it can't be iterated.
        ValueError: it can be iterated only once.
    """

    def __init__(self, data: Iterable[Any], lengths: bool = True) -> None:
        if not isinstance(data, Iterable):
            raise TypeError(f"data={described(data)}: expected an iterable of batches")
        if isinstance(data, Iterator):
            raise ValueError(
                f"data: a {type(data).__name__} can be consumed only once, but every gradient "
                "needs a pass over all batches; pass a DataLoader or a list"
            )
        self.data, self._lengths = data, lengths
        sources = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
        found = [getattr(source, "generator", None) for source in sources]
        #: Generators of the loader's own: rewound, so that every pass has the same batches.
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        self._samples: int | None = None

    @property
    def count(self) -> int | None:
        """How many batches a pass has, where the data can tell."""
        try:
            return len(self.data)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Every batch and its size. Raises ValueError where the passes aren't of equal length."""
        samples = 0
        for batch in self.data:
            size = batch_size(batch, "data") if self._lengths else 1
            samples += size
            yield batch, size
        if samples == 0:
            raise ValueError("data: it gave no batch" + (" any more" if self._samples else ""))
        if samples != (self._samples or samples):
            raise ValueError(
                f"data: {samples} {'samples' if self._lengths else 'batches'} in this pass, "
                f"{self._samples} in the first; every pass has to see the same"
            )
        self._samples = samples
