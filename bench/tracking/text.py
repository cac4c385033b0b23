"""The text of the small language models: Python's own help on its language, in every CPython."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pydoc_data.topics import topics

import torch
from torch import Tensor


def characters() -> tuple[Tensor, int]:
    """The text as numbers of characters (465,000, depending on Python's version), and how many
    different ones there are (about 100).
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text]), len(numbers)


def pieces(text: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch, length + 1) pieces of the text, at random."""
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        yield text[starts + torch.arange(length + 1)]
