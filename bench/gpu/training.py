"""Whole training steps: a plain one, one gradient more, tracked ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import gpt as gpt_model
import lyapcuda
from gpu.timing import Bench, Call

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.paper.models import build  # noqa: E402


def whole_step(bench: Bench, name: str, model: nn.Module, closure: Callable[[], Tensor]) -> None:
    """A row: the forms of one step, in the same rounds."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    trackers = {
        "tracked": lyapcuda.CurvatureTracker(parameters, model=model),
        "tracked, every=10": lyapcuda.CurvatureTracker(parameters, every=10, model=model),
    }

    def gradient() -> None:
        optimizer.zero_grad(set_to_none=True)
        closure().backward()

    def plain() -> None:
        gradient()
        optimizer.step()

    def tracked(name: str) -> None:
        trackers[name].step(closure, leave_grad=True)
        optimizer.step()

    forms: dict[str, Call] = {"plain": plain, "one gradient": gradient}
    forms |= {name: lambda name=name: tracked(name) for name in trackers}
    # Several steps between two clock readings; every=10 has to measure once in each.
    several = {name: 10 if "every" in name else 5 for name in forms}

    def in_turn(name: str) -> Call:
        return lambda: [forms[name]() for _ in range(several[name])]

    calls = {name: [in_turn(name)] for name in forms}
    totals, spread = bench.compare(calls, most=bench.most(1 / 20, 0.05), queue=1)
    seconds = {name: total / several[name] for name, total in totals.items()}
    numel = sum(p.numel() for p in parameters)
    h, steps = (float(getattr(trackers["tracked"], value)) for value in ("h", "steps"))
    bench.row("training", model=name, numel=numel, seconds=seconds, spread=spread, h=h, steps=steps)
    if h != h:
        raise RuntimeError(f"{name}: the tracker has measured nothing")


def resnet18(bench: Bench) -> None:
    """For CIFAR's shape, float32: with and without TF32 in its convolutions and products."""
    batch, size = (4, 8) if bench.rehearse else (512, 32)
    x = torch.randn(batch, 3, size, size, device=bench.device)
    y = torch.randint(0, 10, (batch,), device=bench.device)
    for name, allowed in (("ResNet-18, TF32", True), ("ResNet-18, no TF32", False)):
        if not bench.room(name, 5, 0):
            continue
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.manual_seed(0)
        kind = "resnet0" if bench.rehearse else "resnet18"
        model = build(kind, 3, size, 10).to(bench.device)
        whole_step(bench, name, model, lambda model=model: nn.functional.cross_entropy(model(x), y))
        bench.release()


def gpt(bench: Bench) -> None:
    """124 million parameters, 8 × 1024 tokens, bfloat16 autocast."""
    shape = dict(vocabulary=64, length=16, width=16, heads=2, depth=1) if bench.rehearse else {}
    batch, length = (2, 16) if bench.rehearse else (8, 1024)
    torch.manual_seed(0)
    model = gpt_model.GPT(**shape).to(bench.device)
    tokens = torch.randint(0, model.tokens.num_embeddings, (batch, length + 1), device=bench.device)

    def closure() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return gpt_model.loss_of(model, tokens)

    whole_step(bench, "GPT-2, 124M", model, closure)
