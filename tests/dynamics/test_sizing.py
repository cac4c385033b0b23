"""Δq of trackers whose loss is computed in 16 bits, or whose graph is hidden."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lyapcuda import CurvatureTracker
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.params.flat import FlatLayout
from sync import no_waiting

STEPS = 40
BACKWARD = torch.autograd.backward


class Block(nn.Module):
    """One layer of a transformer, without the masks of torch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.squeeze(1))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small one, which may run its blocks in a checkpoint."""

    def __init__(self, rows: int = 96, width: int = 32, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(rows, width), nn.Sequential(*[Block(width)] * 2)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 96, bias=False)
        self.reentrant = reentrant
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.reentrant is None:
            x = self.blocks(x)
        else:
            x = checkpoint(self.blocks, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def gpt(**options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return GPT(**options), torch.randint(0, 96, (6, 17))


def loss_of(model: nn.Module, tokens: Tensor, bf16: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(tokens[:, :-1]).float()
    return nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten())


def tracked(parameters, closure, steps: int = STEPS, **options) -> CurvatureTracker:
    tracker = CurvatureTracker(parameters, **options)
    for _ in range(steps):
        tracker.step(closure)
    return tracker


def test_a_transformer_in_bfloat16_has_the_curvature_of_float32():
    """Trained to a loss of 0.05, where the curvature changes fast: h was 1.4 times the truth."""
    model, tokens = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(model, tokens, False).backward()
        optimizer.step()
    optimizer.zero_grad()
    truth = tracked(model.parameters(), partial(loss_of, model, tokens, False))
    found = tracked(model.parameters(), partial(loss_of, model, tokens))
    assert float(found.h) == pytest.approx(float(truth.h), rel=0.1)
    low, high = found.interval.tolist()
    assert low < float(truth.h) < high


@pytest.mark.parametrize(
    ("returned", "reentrant"), [(float, None), (Tensor.detach, False), (Tensor.detach, True)]
)
def test_the_precision_is_seen_whatever_the_closure_returns(returned, reentrant):
    model, tokens = gpt(reentrant=reentrant)

    def closure() -> Tensor | float:
        loss = loss_of(model, tokens)
        loss.backward()
        return returned(loss)

    plain, _ = gpt()
    # (The default would take another estimate where a checkpoint hides the graph.)
    one = {"steps": 16, "estimate": "rayleigh"}
    expected = tracked(plain.parameters(), partial(loss_of, plain, tokens), **one)
    found = tracked(model.parameters(), closure, **one)
    assert found.perturbation == expected.perturbation
    assert torch.equal(found.h, expected.h)
    assert torch.autograd.backward is BACKWARD  # it was watched for a while


def test_how_many_gradients_it_takes_and_that_it_waits_no_more():
    torch.manual_seed(0)
    model, calls = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)), 0
    x = torch.randn(16, 6)

    def closure(bf16: bool = True) -> Tensor:
        nonlocal calls
        calls += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(x).float().square().mean()

    tracker = tracked(model.parameters(), closure, 14, debug=False)
    assert calls == 2 * 14 + 5
    tracker = tracked(model.parameters(), closure, 30, debug=False)
    calls = 0
    with no_waiting():
        tracker.step(closure)
    assert calls == 2
    for _ in range(31, 101):
        tracker.step(closure)
    assert calls == 2 * 71 + 3  # it looks again
    calls = 0
    tracked(model.parameters(), lambda: closure(bf16=False), 120, debug=False)
    assert calls == 2 * 120  # seen to be float32


class Coarse(torch.autograd.Function):
    """Rounds to steps of 0.3, which no type shows."""

    @staticmethod
    def forward(ctx, x):
        return (x / 0.3).round() * 0.3

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_where_nothing_is_known_a_warning_and_the_interval_say_so():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2)), torch.randn(4, 6)
    with pytest.warns(UserWarning, match="is not known: parts of the loss can't be seen"):
        tracker = tracked(
            model.parameters(), lambda: Coarse.apply(Coarse.apply(model[0](x)).tanh()).pow(4).sum()
        )
    assert tracker.interval.tolist() == [-math.inf, math.inf]
    assert tracker.history().interval[-1].tolist() == [-math.inf, math.inf]
    saved = tracker.state_dict()
    other = CurvatureTracker(model.parameters())
    other.load_state_dict(saved)
    assert other.sizing.state_dict() == tracker.sizing.state_dict()


def test_an_embeddings_unused_rows_do_not_count():
    few, tokens = gpt()
    many, _ = gpt(rows=20_000)
    with torch.no_grad():
        for p, q in zip(many.parameters(), few.parameters(), strict=True):
            p[: len(q)].copy_(q)
    for bf16 in (False, True):
        sizes = [
            tracked(m.parameters(), partial(loss_of, m, tokens, bf16), 2).perturbation
            for m in (few, many)
        ]
        assert sizes[1] == pytest.approx(sizes[0], rel=0.2)


def by_where(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


@pytest.mark.parametrize(("activation", "smooth"), [(by_where, False), (nn.GELU(), True)])
def test_kinks_that_no_name_shows_are_met(activation, smooth):
    """Part of it hides in a custom function."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.clone()

    torch.manual_seed(0)
    first, last = nn.Linear(40, 300), nn.Linear(300, 3)
    x, y = torch.randn(16, 40), torch.randint(0, 3, (16,))
    parameters = [*first.parameters(), *last.parameters()]

    def closure() -> Tensor:
        hidden = Hidden.apply(activation(first(x)))
        return nn.functional.cross_entropy(last(hidden), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = tracked(parameters, closure)
    layout = FlatLayout(parameters)
    sizes = [default_perturbation(layout, smooth=kind) for kind in (True, False)]
    assert sizes[0] < 0.5 * sizes[1]
    assert tracker.perturbation == pytest.approx(sizes[not smooth], rel=0.1)
