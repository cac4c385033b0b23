"""The vector work of a step with k curvatures against PyTorch, and against the bandwidth of a copy.

    python bench/newton_ops.py [--numel 1000000 ...] [--k 5 10] [--threads 1] [--out OUT]

The step is θ −= rate·g + Σ_i w_i·d_i with w from the slopes d_i·g: panel_slopes_ and panel_descend_
(which read d twice: 8k + 20 bytes a parameter), against eager, tuned in-place eager (matrix-vector
products into buffers made once) and torch.compile of the same arithmetic. All forms take turns
within one round, and ratios are of medians over the rounds, as in bench/ops.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lyapcuda import ops
from ops import COPY_BYTES, cpu_name


def eager_step(theta: Tensor, g: Tensor, d: Tensor, rates: Tensor, rest: float) -> Tensor:
    """As one would write it down."""
    along = (rates - rest) * (d @ g)
    return theta - (rest * g + along @ d)


def forms(n: int, k: int, compile: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    theta, g = (torch.randn(n, generator=generator) for _ in range(2))
    d = torch.randn(k, n, generator=generator) / n**0.5
    h = torch.linspace(20.0, 5.0, k, dtype=torch.float64)
    state = ops.new_panel_state(
        "cpu", k, perturbation=1.0, accepted=1.0, pending=1.0, residual=0.1, h_ema=h,
        transform=torch.eye(k, dtype=torch.float64),
    )  # fmt: skip
    rates, rest = (1e-9 / h).float(), 2e-10  # θ stays finite, however often
    copy, step = torch.empty_like(g), torch.empty_like(g)
    slopes = torch.empty(k)

    def ours() -> None:
        call = ([theta], [g], [0], d, state)
        ops.panel_descend_(*call, ops.panel_slopes_(*call), gain=1e-9)

    def tuned() -> None:
        torch.mv(d, g, out=slopes)
        torch.mv(d.T, slopes.mul_(rates - rest), out=step)
        theta.sub_(step).sub_(g, alpha=rest)

    out = {
        "copy": lambda: ops.stream_copy_(copy, g),
        "ours": ours,
        "eager": lambda: eager_step(theta, g, d, rates, rest),
        "tuned": tuned,
    }
    if compile:
        compiled = torch.compile(eager_step, dynamic=False)
        out["compiled"] = lambda: compiled(theta, g, d, rates, rest)
    return out


def measure(n: int, k: int, seconds: float, compile: bool) -> dict[str, float]:
    candidates = forms(n, k, compile)
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["copy"]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--numel", type=int, nargs="+", default=[10**6, 10**7])
    add("--k", type=int, nargs="+", default=[5, 10])
    add("--threads", type=int, nargs="+", default=[1])
    add("--seconds", type=float, default=10.0, help="of measuring, for each case")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    machine = f"{cpu_name()}, torch {torch.__version__}, {ops.build_info()['simd']}"
    rows = []
    lines = ["# The vector work of a step with k curvatures", "", f"Machine: {machine}.", ""]
    lines += [
        "| N | k | threads | ours GB/s | of copy | eager | tuned eager | torch.compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for n in arguments.numel:
            for k in arguments.k:
                torch._dynamo.reset()
                seconds = measure(n, k, arguments.seconds, not arguments.no_compile)
                rate = (8 * k + 20) * n / seconds["ours"] / 1e9
                copy = COPY_BYTES * n / seconds["copy"] / 1e9
                others = [seconds.get(form) for form in ("eager", "tuned", "compiled")]
                ratios = [f"{t / seconds['ours']:.1f}×" if t else "–" for t in others]
                cells = [f"{n:.0e}", f"{k}", f"{threads}", f"{rate:.1f}", f"{rate / copy:.0%}"]
                lines.append(f"| {' | '.join(cells + ratios)} |")
                print(lines[-1], flush=True)
                rows.append({"numel": n, "k": k, "threads": threads, "seconds": seconds})
    lines += ["", "The last three columns: their time over ours. Made by `bench/newton_ops.py`."]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        )
        arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
