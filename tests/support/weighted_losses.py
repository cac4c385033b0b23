"""Losses over padded sequences that count their batches differently, and batches of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 7, 6
#: Labels of each sequence that aren't padding: none of the first batch of `SPANS` are.
KNOWN = (6, 6, 6, 5, 6, 2, 3, 1, 2, 1)
#: Where the ten sequences are cut.
SPANS = ((0, 3), (3, 7), (7, 10))


def net(*more: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Embedding(VOCABULARY, 5), nn.Linear(5, 6), nn.Tanh(), *more]
    return nn.Sequential(*layers, nn.Linear(6, VOCABULARY)).to(dtype)


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (len(KNOWN), LENGTH)
    ids, labels = (torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(2))
    targets = torch.randn(*shape, VOCABULARY, generator=generator, dtype=torch.float64)
    full = labels.clone()
    for i, known in enumerate(KNOWN):
        labels[i, known:] = -100
    return {"ids": ids, "full": full, "target": targets, "labels": labels}


def cut(batch, spans=SPANS):
    return [{name: t[a:b] for name, t in batch.items()} for a, b in spans]


def _known(b):
    return b["labels"] != -100


def _tokens(m, b, labels="labels", **options):
    return F.cross_entropy(m(b["ids"]).flatten(0, 1), b[labels].flatten(), **options)


def _each(m, b):
    return _tokens(m, b, reduction="none").view(b["labels"].shape)


def _off(m, b):
    return m(b["ids"]) - b["target"]


class _Hidden(torch.autograd.Function):
    """Stands for what hides the end of a loss: a compiled part, a fused loss."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


#: What a batch counts, by what its loss is.
LENGTHS = {
    "samples": lambda m, b: F.cross_entropy(m(b["ids"])[:, -1], b["full"][:, -1]),
    "mse": lambda m, b: F.mse_loss(m(b["ids"]), b["target"]),
    "written out": lambda m, b: _off(m, b).pow(2).mean(),
    "a mean, summed": lambda m, b: _off(m, b).pow(2).mean(0).sum(),
    "sequences' means": lambda m, b: (_each(m, b).sum(1) / _known(b).sum(1)).mean(),
    "a scaled mean": lambda m, b: _tokens(m, b, "full") / 4,
    "a sum over the batch's length": lambda m, b: _each(m, b).sum() / len(b["ids"]),
    "batchmean": lambda m, b: F.kl_div(
        m(b["ids"]).log_softmax(-1), b["target"].softmax(-1), reduction="batchmean"
    ),
    "hidden": lambda m, b: _Hidden.apply(_tokens(m, b, "full")),
    "hidden means": lambda m, b: _Hidden.apply(_each(m, b).sum(1).mean()),
}
COUNTS = {
    "tokens": _tokens,
    "weighted classes": lambda m, b: _tokens(
        m, b, weight=torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64)
    ),
    "smoothed labels": lambda m, b: _tokens(m, b, label_smoothing=0.1),
    "beside a penalty": lambda m, b: (
        _tokens(m, b) + 0.01 * sum(p.square().sum() for p in m.parameters())
    ),
    "masked": lambda m, b: (_each(m, b) * _known(b)).sum() / _known(b).sum(),
    "masked, by a factor": lambda m, b: _each(m, b).sum() * (1 / _known(b).sum()),
    "selected": lambda m, b: _each(m, b)[_known(b)].mean(),
    "relative": lambda m, b: _off(m, b).pow(2).sum() / b["target"].pow(2).sum(),
    "hidden tokens": lambda m, b: _Hidden.apply(_tokens(m, b)),
    "hidden next tokens": lambda m, b: _Hidden.apply(
        F.cross_entropy(m(b["ids"])[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())
    ),
}
SUMS = {
    "tokens, summed": lambda m, b: _tokens(m, b, reduction="sum"),
    "mse, summed": lambda m, b: F.mse_loss(m(b["ids"]), b["target"], reduction="sum"),
    "half of squares": lambda m, b: 0.5 * _off(m, b).pow(2).sum(),
    "over all there are": lambda m, b: _tokens(m, b, reduction="sum") / sum(KNOWN),
    "a product": lambda m, b: _off(m, b).flatten() @ _off(m, b).flatten(),
    "a mean times the length": lambda m, b: _tokens(m, b, "full") * len(b["ids"]),
    "hidden sum": lambda m, b: _Hidden.apply(_tokens(m, b, reduction="sum")),
}
ALL = {**LENGTHS, **COUNTS, **SUMS}
#: Those that no weights explain.
UNCLEAR = {
    "terms that count differently": lambda m, b: _tokens(m, b) + _tokens(m, b, "full"),
    "a distance of means": lambda m, b: _off(m, b).mean((0, 1)).pow(2).sum(),
    "a sum beside a penalty": lambda m, b: (
        _tokens(m, b, reduction="sum") + sum(p.square().sum() for p in m.parameters())
    ),
}
