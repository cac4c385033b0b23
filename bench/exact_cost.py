"""What mode="exact" costs beside differences of gradients, and what either sees.

    python bench/exact_cost.py [--rounds N] [--models mlp lenet1 resnet18 gpt]

Training steps (zero_grad, backward, SGD) plain and tracked, in turns, on one thread. Time: CPU time
of the fastest step in plain ones. Memory: what a step allocates at its peak, in that of a plain
one, the gradient included; a tracker's two buffers of N floats a separation are there before. h/h0:
after 40 steps at one θ, h by the Rayleigh and by the Schwarz quotient, over the largest eigenvalue
of the Hessian at θ by `eigsh(mode="exact")`. Data are random numbers, of ten classes; the nets have
been trained for some steps of SGD. The GPT's attention is written out: the fused one can't be
differentiated twice. A model is measured again without the others: exact_cost.json keeps the last
run of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lyapcuda
from gpt import GPT, loss_of
from ops import cpu_name

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from allocated_memory import peak_allocated  # noqa: E402
from examples.paper.models import build  # noqa: E402

#: Model → batch size, steps of training.
SIZES = {"mlp": (512, 60), "lenet1": (512, 60), "resnet18": (8, 10), "gpt": (8, 20)}
MODES = ("difference", "exact")
KS = (1, 3)
FROZEN = 40
Step = Callable[[], object]


def problem(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and its loss on one batch of random numbers."""
    torch.manual_seed(0)
    batch = SIZES[name][0]
    if name == "gpt":
        model, tokens = GPT(64, 64, 128, 4, 4), torch.randint(0, 64, (batch, 65))

        def loss() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return loss_of(model, tokens)

        return model, loss
    model = build(name, 3, 32, 10)
    centres, labels = torch.randn(10, 3, 32, 32), torch.randint(0, 10, (batch,))
    x = centres[labels] + torch.randn(batch, 3, 32, 32)
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def row(name: str, rounds: int) -> list[str]:
    """A model's rows of both tables."""
    model, loss = problem(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def step(backward: Step) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    steps: dict[str, Step] = {"plain": partial(step, lambda: loss().backward())}
    for _ in range(SIZES[name][1]):
        steps["plain"]()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for k in KS:
        for mode in MODES:
            tracker = lyapcuda.CurvatureTracker(model.parameters(), k, mode=mode)
            steps[f"{mode}, k = {k}"] = partial(step, partial(tracker.backward, loss))
    for each in steps.values():
        for _ in range(5):  # the first ones choose Δq, and compare gradients
            each()
    times = {key: min(seconds(each) for _ in range(rounds)) for key, each in steps.items()}
    peaks = {}
    for key, each in steps.items():
        optimizer.zero_grad()  # a gradient freed in between would count as less
        peaks[key] = peak_allocated(each)
    cells = [f"{1e3 * times['plain']:.1f} ms, {peaks['plain'] / 2**20:.1f} MB"]
    for key in list(steps)[1:]:
        cells.append(f"{times[key] / times['plain']:.2f}, {peaks[key] / peaks['plain']:.2f}")
    model.eval()  # BatchNorm as a fixed function
    h0 = lyapcuda.eigsh(loss, model.parameters(), 1, mode="exact").eigenvalues[0]
    seen = []
    for mode in MODES:
        tracker = lyapcuda.CurvatureTracker(model.parameters(), mode=mode)
        for _ in range(FROZEN):
            tracker.step(loss)
        seen.append(f"{float(tracker.rayleigh / h0):.3f}, {float(tracker.schwarz / h0):.3f}")
    numel = sum(p.numel() for p in model.parameters())
    return [
        f"| {name}, batch {SIZES[name][0]}, {numel / 1e6:.1f} M | " + " | ".join(cells) + " |",
        f"| {name} | {float(h0):.3g} | " + " | ".join(seen) + " |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/exact_cost.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = arguments.out.with_suffix(".json")
    runs = json.loads(kept.read_text()) if kept.exists() else {}
    for name in arguments.models:
        runs[name] = row(name, arguments.rounds)
        kept.write_text(json.dumps(runs, indent=1))
        print(*runs[name], sep="\n", flush=True)
    rows = [runs[name] for name in SIZES if name in runs]
    titles = " | ".join(f"{mode}, k = {k}" for k in KS for mode in MODES)
    lines = ["# What exact products cost a tracker", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    lines += [f"| time, memory | plain | {titles} |", "|---" * 6 + "|", *(r[0] for r in rows), ""]
    lines += ["| h/h0: ρ, y·y/(q·y) | h0 | difference | exact |", "|---" * 4 + "|"]
    lines += [*(r[1] for r in rows), ""]
    arguments.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
