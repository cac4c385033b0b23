"""Curvature as it is measured on a GPU, in float32, TF32 and bfloat16 autocast.

    python bench/gpu_accuracy.py [--device cuda] [--out FILE]

Three small nets after five steps of SGD, cross-entropy on random data, θ frozen. Compared with 200
power iterations on products of double backward in float64 at the same θ (its model runs without
autocast): `h` of a tracker after 40 measurements with k = 1 and after 25 with k = 5, and eigsh's
value. Last come five training steps over two micro-batches with clipping; their loss is shown.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import lyapcuda

Loss = Callable[[nn.Module, torch.dtype], Tensor]


def mlp(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(256, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10))
    )


def conv() -> nn.Module:
    first = (nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    second = (nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETS = {
    "GELU MLP": (lambda: mlp(nn.GELU), (256, 256)),
    "ReLU MLP": (lambda: mlp(nn.ReLU), (256, 256)),
    "ReLU conv, BatchNorm": (conv, (128, 3, 32, 32)),
}
MODES = ("float32", "TF32", "bfloat16 autocast")


def power_iteration(model: nn.Module, loss: Loss, iterations: int = 200) -> float:
    """The largest eigenvalue by modulus, in float64."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss(model, torch.float64), parameters, create_graph=True)
    torch.manual_seed(1)
    v, found = [torch.randn_like(p) for p in parameters], 0.0
    for _ in range(iterations):
        norm = torch.sqrt(sum(x.square().sum() for x in v))
        v = [x / norm for x in v]
        product = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        found = float(sum((a * b).sum() for a, b in zip(v, product, strict=True)))
        v = [h.detach() for h in product]
    return found


def rows(device: str) -> Iterator[str]:
    heads = "net, arithmetic, float64, h at k = 1, h at k = 5, eigsh, converged, loss, seconds"
    yield f"| {heads.replace(', ', ' | ')} |"
    yield "|---" * 9 + "|"
    generator = torch.Generator(device).manual_seed(0)
    for name, (make, shape) in NETS.items():
        for mode in MODES:
            allowed = mode == "TF32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
            torch.manual_seed(0)
            model = make().to(device)
            x = torch.randn(shape, device=device, generator=generator)
            y = torch.randint(0, 10, shape[:1], device=device, generator=generator)

            def loss(model: nn.Module, dtype=torch.float32, mode=mode, x=x, y=y) -> Tensor:
                half = mode == "bfloat16 autocast" and dtype == torch.float32
                with torch.autocast(device, torch.bfloat16, enabled=half):
                    return nn.functional.cross_entropy(model(x.to(dtype)), y)

            yield row(name, mode, model, loss, [(x[:64], y[:64]), (x[64:128], y[64:128])])


def row(name: str, mode: str, model: nn.Module, loss: Loss, parts: list) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    truth, start = power_iteration(model, loss), time.monotonic()
    one, five = (lyapcuda.CurvatureTracker(model.named_parameters(), k=k) for k in (1, 5))
    for tracker, steps in ((one, 40), (five, 25)):
        for _ in range(steps):
            tracker.step(lambda: loss(model))
    found = lyapcuda.eigsh(lambda: loss(model), model.named_parameters(), k=1)
    values = [float(one.h), float(five.h[0]), float(found.eigenvalues[0])]
    last = torch.tensor(float("nan"))
    for _ in range(5):
        optimizer.zero_grad()
        last = one.step(
            lambda part: nn.functional.cross_entropy(model(part[0]), part[1]),
            batches=parts,
            leave_grad=True,
        )
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    took = time.monotonic() - start
    off = " | ".join(f"{value / truth - 1:+.1%}" for value in values)
    sure = "yes" if bool(found.converged[0]) else "no"
    return f"| {name} | {mode} | {truth:.4g} | {off} | {sure} | {float(last):.3f} | {took:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the table goes here too")
    options = parser.parse_args()
    warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)  # said in the table
    lines = []
    for line in rows(options.device):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
