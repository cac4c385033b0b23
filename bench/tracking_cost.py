"""What tracking costs beside a training step.

    python bench/tracking_cost.py [--models mlp lenet1 resnet18] [--rounds N] [--threads 2]
    python bench/tracking_cost.py --host NAME [--rounds N]    # see HOST below

Training steps (zero_grad, backward, SGD) plain and tracked in every mode, in blocks (of ten steps;
for ResNet-18, whose step takes seconds, of one, and without the modes that don't measure at every
step), the modes in turns. Reported are the fastest block of a mode over the fastest plain one, and
the median over the rounds of a block's time over that of the same round's plain block. Times are
wall clock, with one thread the process's CPU time. A model is reported on again without the others:
tracking_cost.json keeps the last run of each.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lyapcuda
from lyapcuda import ops
from lyapcuda.objective.random_states import RandomStates
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.models import build  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TENTH = 0.1

HOST = """What a tracked step costs the host.

    python bench/tracking_cost.py --host NAME [--rounds N]

The time of `tracker.step(closure)` on one thread, less that of its closures: the nets' tensors have
4 or 16 elements, so that neither gradients nor vectors take long, and what is left is work for each
tensor. "gpt2" has GPT-2's 148 tensors, "resnet18" ResNet-18's 62 and its 60 buffers, which the
closure writes. The gradients come from one function over all parameters. In every round a block of
ten tracked steps follows one of ten times k + 1 plain evaluations (gradients cleared, forward,
backward). Reported are the medians over the rounds of both and of their differences, with
quartiles, in the process's CPU time a step. tracking_cost_host.json keeps the runs of other names,
which are other states of the code. Below: what torch and the ops alone take of a step with k = 1
for gpt2's tensors, called with nothing around them; medians of 200.
"""

Step = Callable[[], object]

#: Model → batch size, steps in a block.
BATCHES = {"mlp": (512, 10), "lenet1": (512, 10), "resnet18": (32, 1)}


def stepping(name: str) -> dict[str, Step]:
    """A training step of one model in every mode."""
    batch, length = BATCHES[name]
    torch.manual_seed(0)
    model = build(name, 3, 32, 10)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    rest, part = lyapcuda.split_batch((x, y), TENTH)
    halves = lyapcuda.split_batch((x, y), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def plain() -> None:
        optimizer.zero_grad()
        loss_of((x, y)).backward()
        optimizer.step()

    def whole() -> Tensor:
        return loss_of((x, y))

    def mode(closure: Callable, *, half: bool = False, every: int = 1, **measure) -> Step:
        tracker = lyapcuda.CurvatureTracker(model.parameters(), every=every)

        def step() -> None:
            if half and tracker.due:
                tracker.step(loss_of, batches=halves, leave_grad=True)
            else:
                tracker.step(closure, **measure, leave_grad=True)
            optimizer.step()

        return step

    def accumulated() -> None:
        optimizer.zero_grad()
        for part_of in (rest, part):
            (loss_of(part_of) * (len(part_of[1]) / batch)).backward()
        optimizer.step()

    def backward() -> None:
        optimizer.zero_grad()
        loss_of((x, y)).backward()

    def tenth() -> None:
        optimizer.zero_grad()
        loss_of(part).backward()

    steps = {
        "plain": plain,
        "every=1": mode(whole),
        "every=10": mode(whole, every=10),
        "every=5, a half, batches= where due": mode(whole, every=5, half=True),
        "a tenth, measure=": mode(whole, measure=lambda: loss_of(part)),
        "a tenth, batches=": mode(loss_of, batches=(rest, part)),
        "plain, accumulated as rest + tenth": accumulated,
        "(the gradient alone)": backward,
        "(the gradient of a tenth alone)": tenth,
    }
    skipped = () if length > 1 else ("every=10", "every=5, a half, batches= where due")
    return {mode: step for mode, step in steps.items() if mode not in skipped}


def time_of(step: Step, steps: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(steps):
        step()
    return clock() - start


def measured_cost(name: str, rounds: int) -> dict[str, Any]:
    steps, length = stepping(name), BATCHES[name][1]
    found: dict[str, list[float]] = {mode: [] for mode in steps}
    for step in steps.values():
        time_of(step, 3 if length > 1 else 1)
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        for mode in order:
            found[mode].append(time_of(steps[mode], length) / length)
    return {"threads": torch.get_num_threads(), "seconds": found}


def cost_table(name: str, run: dict[str, Any]) -> list[str]:
    found = run["seconds"]
    base = found["plain"]
    lines = [
        f"## {name}, batch {BATCHES[name][0]}",
        "",
        "| mode | fastest blocks | median | quartiles |",
        "|---" * 4 + "|",
    ]
    for mode in list(found)[1:]:
        over = [a / b for a, b in zip(found[mode], base, strict=True)]
        low, middle, high = statistics.quantiles(over, n=4)
        fastest = min(found[mode]) / min(base)
        lines.append(f"| {mode} | {fastest:.3f} | {middle:.3f} | {low:.3f}–{high:.3f} |")
    step = f"{min(base) * 1e3:.1f} ms (fastest block), {run['threads']} thread(s)"
    gradient = min(found["(the gradient alone)"])
    left = (min(found["every=1"]) - min(base) - gradient) / min(base)
    text = f"A plain step: {step}. every=1 less a step and a gradient: {left:.1%} of a step."
    return [*lines, "", f"{text} {len(base)} rounds.", ""]


def cost(rounds: int, names: list[str]) -> list[str]:
    path = RESULTS / "tracking_cost.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        runs[name] = measured_cost(name, rounds)
        rounded = [[round(t, 6) for t in times] for times in runs[name]["seconds"].values()]
        runs[name]["seconds"] = dict(zip(runs[name]["seconds"], rounded, strict=True))
        path.write_text(json.dumps(runs, indent=1))
    return [line for name in BATCHES if name in runs for line in cost_table(name, runs[name])]


# --- the host's part -----------------------------------------------------------------------------


class Cheap(torch.autograd.Function):
    """A loss of many tensors whose gradients, half of each, take next to no time."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return torch._foreach_mul(ctx.saved_tensors, 0.5)


def small_gpt2() -> nn.Module:
    """As many modules and tensors as GPT-2 has, of width 4."""

    def half() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))

    layers = [nn.Sequential(half(), half()) for _ in range(12)]
    return nn.Sequential(nn.Embedding(4, 4), nn.Embedding(4, 4), *layers, nn.LayerNorm(4))


def small_resnet18() -> nn.Module:
    """As many modules, tensors and buffers as ResNet-18 has, of width 4."""
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) for _ in range(20)]
    return nn.Sequential(*layers, nn.Linear(4, 4))


HOST_MODELS = {"gpt2": small_gpt2, "resnet18": small_resnet18}
HOST_KS = (1, 5, 14)
HOST_BLOCK = 10  # steps


def host_seconds(model: nn.Module, k: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a tracked step and of its closures, a number a round."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    tracker = lyapcuda.CurvatureTracker(model.named_parameters(), k=k)

    def closure() -> Tensor:
        if buffers:
            torch._foreach_add_(buffers, 1)
        return Cheap.apply(*parameters)

    def closures() -> None:
        for _ in range(k + 1):
            for parameter in parameters:
                parameter.grad = None
            closure().backward()

    def tracked() -> None:
        tracker.step(closure)

    time_of(tracked, HOST_BLOCK), time_of(closures, HOST_BLOCK)
    found: dict[str, list[float]] = {"closures": [], "tracked": []}
    for _ in range(rounds):
        found["closures"].append(time_of(closures, HOST_BLOCK) / HOST_BLOCK)
        found["tracked"].append(time_of(tracked, HOST_BLOCK) / HOST_BLOCK)
    if float((tracker.h - 0.5).abs().max()) > 1e-3:
        raise RuntimeError(f"h = {tracker.h}, but the Hessian is half the identity")
    return found


def host_floor() -> list[str]:
    """What a tracked step of one separation can't do without, part by part."""
    parameters = list(small_gpt2().parameters())
    Cheap.apply(*parameters).backward()
    places, gradients = [p.data for p in parameters], [p.grad for p in parameters]
    q, d = (torch.zeros(1, 64 * len(parameters)) for _ in range(2))
    offsets = list(range(0, 64 * len(parameters), 64))
    copies = [d[0, at : at + p.numel()].view_as(p) for at, p in zip(offsets, places, strict=True)]
    state = ops.new_state("cpu", perturbation=1e-3, beta=0.1)
    losses = torch.zeros(2, dtype=torch.float64)

    def hold(values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value

    def put_back() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def update() -> None:
        ops.recenter_(q, d, d, places, offsets, state)
        ops.benettin_(state, ops.ascent_(d, q, gradients, d, offsets, state), losses, 1)

    def surroundings() -> None:
        kept = RandomStates(())
        kept.restore(), kept.restore()

    parts: dict[str, Step] = {
        "where θ lies, read": lambda: [p.data for p in parameters],
        "θ + q in its place, and θ again": lambda: (hold(copies), hold(places)),
        "`.grad` read, before and after both evaluations": lambda: [
            [p.grad for p in parameters] for _ in range(3)
        ],
        "`.grad` put back": put_back,
        "a gradient copied to where θ + q lay": lambda: torch._foreach_copy_(copies, gradients),
        "`recenter_`, `ascent_`, `benettin_`": update,
        "random states kept, put back twice": surroundings,
    }
    with torch.no_grad():
        seconds = {
            name: statistics.median(time_of(part, 1) for _ in range(200))
            for name, part in parts.items()
        }
    lines = ["| part | ms |", "|---" * 2 + "|"]
    lines += [f"| {name} | {1e3 * value:.3f} |" for name, value in seconds.items()]
    return [*lines, f"| sum | {1e3 * sum(seconds.values()):.2f} |", ""]


def host_cost(name: str, rounds: int) -> list[str]:
    """Measures under a name; returns the table of all names."""
    path = RESULTS / "tracking_cost_host.json"
    runs = json.loads(path.read_text()) if path.exists() else {}
    runs[name] = {"machine": f"{cpu_name()}, torch {torch.__version__}", "milliseconds": {}}
    for model, make in HOST_MODELS.items():
        for k in HOST_KS:
            torch.manual_seed(0)
            seconds = host_seconds(make(), k, rounds)
            runs[name]["milliseconds"][f"{model}, k = {k}"] = {
                part: [round(1e3 * t, 4) for t in times] for part, times in seconds.items()
            }
    path.write_text(json.dumps(runs, indent=1))
    lines = ["| tensors | run | tracked step | its closures | beyond them | quartiles |"]
    lines.append("|---" * 6 + "|")
    for case in runs[name]["milliseconds"]:
        for run, kept in runs.items():
            tracked, closures = (kept["milliseconds"][case][p] for p in ("tracked", "closures"))
            beyond = [a - b for a, b in zip(tracked, closures, strict=True)]
            low, middle, high = statistics.quantiles(beyond, n=4)
            times = [statistics.median(tracked), statistics.median(closures), middle]
            row = " | ".join(f"{t:.2f} ms" for t in times)
            lines.append(f"| {case} | {run} | {row} | {low:.2f}–{high:.2f} |")
    machines = [f"{run}: {kept['machine']}, {rounds} rounds." for run, kept in runs.items()]
    return [*lines, "", *machines, ""]


def report(name: str, title: str, about: str, lines: list[str]) -> None:
    """Writes results/NAME.md: the title, what it is about, the machine, the lines."""
    machine = f"Machine: {cpu_name()}, torch {torch.__version__}."
    text = [f"# {title}", "", about.split("\n\n", 2)[2].strip(), "", machine, "", *lines]
    (RESULTS / f"{name}.md").write_text("\n".join(text))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--models", nargs="+", default=["mlp", "lenet1"], choices=BATCHES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--host", metavar="NAME", help="measure the host's part, under a name")
    arguments = parser.parse_args()
    if arguments.host:
        torch.set_num_threads(1)
        lines = [*host_cost(arguments.host, arguments.rounds), *host_floor()]
        report("tracking_cost_host", "What a tracked step costs the host", HOST, lines)
        return
    torch.set_num_threads(arguments.threads)
    lines = cost(arguments.rounds, arguments.models)
    report("tracking_cost", "What tracking costs", __doc__, lines)


if __name__ == "__main__":
    main()
