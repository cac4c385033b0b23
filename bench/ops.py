"""The vector work of a step against PyTorch, and against the bandwidth of a copy.

    python bench/ops.py [--numel 100000 1000000 ...] [--threads 1 2] [--out bench/results/NAME]

Two jobs, each in four forms (ours, straightforward eager, tuned in-place eager, torch.compile):

- update: d = q + βy with y = g1 − g0, and ‖d‖², ‖q‖², q·y, ‖y‖² (reads q, g0, g1, writes d: 16
  bytes a parameter in fp32);
- step: the update, the scalars λ, β, h and the error bar, and the re-centring θ1 = θ + q·Δq/‖d‖
  (reads d and θ, writes θ1: 12 more).

GB/s are bytes that have to move over the time taken, whatever a form really moves. The copy is
torch.ops.lyapcuda.stream_copy_, measured in the same run. All forms take turns within one round,
and ratios are of medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lyapcuda import ops

SIZE = 5e-2
UPDATE_BYTES, STEP_BYTES, COPY_BYTES = 16, 28, 8


def eager_update(q: Tensor, g0: Tensor, g1: Tensor, beta: float):
    """As one would write it down."""
    y = g1 - g0
    d = q + beta * y
    return d, (d * d).sum(), (q * q).sum(), (q * y).sum(), (y * y).sum()


def eager_step(theta: Tensor, q: Tensor, g0: Tensor, g1: Tensor, beta: float):
    """As one would write it down, scalars on the device."""
    d, dd, qq, qy, yy = eager_update(q, g0, g1, beta)
    exponent = 0.5 * torch.log(dd / qq)
    rayleigh = qy / qq
    residual = torch.sqrt((yy / qq - rayleigh**2).clamp(min=0))
    q = d * (SIZE / torch.sqrt(dd))
    return q, theta + q, exponent, rayleigh, residual


class Tuned:
    """In place, into buffers made once, with dot products for the sums."""

    def __init__(self, like: Tensor) -> None:
        self.y, self.theta1 = torch.empty_like(like), torch.empty_like(like)

    def update(self, q: Tensor, g0: Tensor, g1: Tensor, beta: float):
        y = torch.sub(g1, g0, out=self.y)
        qq, qy, yy = torch.dot(q, q), torch.dot(q, y), torch.dot(y, y)
        q.add_(y, alpha=beta)
        return torch.dot(q, q), qq, qy, yy

    def step(self, theta: Tensor, q: Tensor, g0: Tensor, g1: Tensor, beta: float):
        dd, qq, qy, yy = self.update(q, g0, g1, beta)
        rayleigh = qy / qq
        exponent = 0.5 * torch.log(dd / qq)
        residual = torch.sqrt((yy / qq - rayleigh**2).clamp(min=0))
        q.mul_(SIZE / torch.sqrt(dd))
        torch.add(theta, q, out=self.theta1)
        return exponent, rayleigh, residual


def forms(n: int) -> dict[str, Callable[[], object]]:
    """Every form of every job on data of its own size; the data stays finite however often."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(n, generator=generator).mul_(scale)

    theta, g0 = normal(), normal()
    q = normal(SIZE / n**0.5)
    g1 = g0 + 1e-3 * q
    d, beta = torch.empty_like(q), 0.5
    state = ops.new_state("cpu", perturbation=SIZE, scale=1.0, beta=beta)
    losses = torch.zeros(2, dtype=torch.float64)
    tuned = Tuned(q)
    compiled_update = torch.compile(eager_update, dynamic=False)
    compiled_step = torch.compile(eager_step, dynamic=False)
    turns = [(q.clone(), d)]

    def our_update() -> Tensor:
        return ops.ascent_(d, q, [g0], [g1], [0], state)

    def our_step() -> None:
        # As the tracker does: the two buffers take turns as q and as θ1, then d.
        here, other = turns[0]
        ops.recenter_([other], here, other, [theta], [0], state)
        sums = ops.ascent_(other, here, [g0], [g1], [0], state)
        ops.exponent_(state, sums, losses, control=False)
        turns[0] = (other, here)

    tuned_q = q.clone()
    return {
        "copy": lambda: ops.stream_copy_(d, q),
        "torch copy_": lambda: d.copy_(q),
        "update/ours": our_update,
        "update/eager": lambda: eager_update(q, g0, g1, beta),
        "update/tuned": lambda: tuned.update(tuned_q, g0, g1, 1e-6),
        "update/compiled": lambda: compiled_update(q, g0, g1, beta),
        "step/ours": our_step,
        "step/eager": lambda: eager_step(theta, q, g0, g1, beta),
        "step/tuned": lambda: tuned.step(theta, tuned_q, g0, g1, 1e-6),
        "step/compiled": lambda: compiled_step(theta, q, g0, g1, beta),
    }


def measure(n: int, seconds: float) -> dict[str, float]:
    """Median seconds of every form; they take turns, so that a slow spell hits all of them."""
    candidates = forms(n)
    for run in candidates.values():
        run()
        run()
    repeat = max(1, int(2e-4 / (n * 2e-9)))  # small ones several times between clock readings
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            times[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    sizes = [10**5, 10**6, 10**7, 10**8]
    add("--numel", type=int, nargs="+", default=sizes, help="parameters (default 1e5 to 1e8)")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--seconds", type=float, default=10.0, help="of measuring, for each size and thread count")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()

    machine = f"{cpu_name()}, {torch.get_num_threads()} cores, torch {torch.__version__}"
    rows, lines = [], [f"Machine: {machine}, {ops.build_info()['simd']}.", ""]
    lines += [
        "| job | N | threads | ours GB/s | of copy | eager | tuned eager | torch.compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for n in arguments.numel:
            torch._dynamo.reset()
            seconds = measure(n, arguments.seconds)
            copy = COPY_BYTES * n / seconds["copy"] / 1e9
            for job, size in (("update", UPDATE_BYTES), ("step", STEP_BYTES)):
                ours = seconds[f"{job}/ours"]
                rate = size * n / ours / 1e9
                times = [seconds[f"{job}/{form}"] / ours for form in ("eager", "tuned", "compiled")]
                lines.append(
                    f"| {job} | {n:.0e} | {threads} | {rate:.1f} | {rate / copy:.0%} | "
                    + " | ".join(f"{ratio:.1f}×" for ratio in times)
                    + " |"
                )
                print(lines[-1], flush=True)
            rows.append({"numel": n, "threads": threads, "copy_GB/s": copy, "seconds": seconds})
    lines += ["", "The last three columns: their time over ours. Made by `bench/ops.py`."]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine, "build": ops.build_info(), "rows": rows}
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text("\n".join(["# Vector work", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
