"""The ops against PyTorch, and against the bandwidth of a copy.

    python bench/ops.py [--numel 100000 1000000 ...] [--threads 1 2] [--out bench/results/NAME]
    python bench/ops.py --only steps          # the jobs alone
    python bench/ops.py --only ops [--op ascent_ recenter_]

Two jobs of one separation, each in four forms (ours, straightforward eager, tuned in-place eager,
torch.compile):

- update: d = q + βy with y = g1 − g0, and ‖q‖², q·y, ‖y‖² (reads q, g0, g1, writes d: 16 bytes a
  parameter in fp32);
- step: the update, the scalars λ, β, h and the error bar, and the re-centring θ1 = θ + q·Δq/‖d‖
  (reads d and θ, writes θ1: 12 more).

Then every op against the fastest eager code that we know of (bench/op_jobs.py).

GB/s are bytes that have to move over the time taken, whatever a form really moves. The copy is
torch's copy_, measured in the same run. All forms take turns within one round; ratios are of
medians over the rounds for the jobs, and of minima for the ops. With one thread, times are those of
that thread on a processor.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import op_jobs
from lyapcuda import ops
from op_jobs import SIZE, Call, Job

UPDATE_BYTES, STEP_BYTES, COPY_BYTES = 16, 28, 8
#: What an op is to beat eager code by.
WANTED = 1.3


# --- the jobs of one separation ------------------------------------------------------------------


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


def our_step(
    theta: Tensor, q: Tensor, g0: Tensor, g1: Tensor, state: Tensor, losses: Tensor
) -> Call:
    """As the tracker does: the two buffers take turns as q, and as θ1, then d."""
    turns = [(q.clone()[None], torch.empty_like(q)[None])]

    def step() -> None:
        here, other = turns[0]
        ops.recenter_(here, other, other, [theta], [0], state)
        gram = ops.ascent_(other, here, [g0], g1[None], [0], state)
        ops.benettin_(state, gram, losses, 1, control=False)
        turns[0] = (other, here)

    return step


def forms(n: int) -> dict[str, Call]:
    """Every form of every job on data of its own size; the data stays finite however often."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(n, generator=generator).mul_(scale)

    theta, g0 = normal(), normal()
    q = normal(SIZE / n**0.5)
    g1 = g0 + 1e-3 * q
    d, beta = torch.empty_like(q), 0.5
    state = ops.new_state("cpu", perturbation=SIZE, beta=beta)
    losses = torch.zeros(2, dtype=torch.float64)
    tuned, tuned_q = Tuned(q), q.clone()
    compiled_update = torch.compile(eager_update, dynamic=False)
    compiled_step = torch.compile(eager_step, dynamic=False)
    call = (d[None], q[None], [g0], g1[None], [0], state)
    return {
        "copy": lambda: d.copy_(q),
        "update/ours": lambda: ops.ascent_(*call),
        "update/eager": lambda: eager_update(q, g0, g1, beta),
        "update/tuned": lambda: tuned.update(tuned_q, g0, g1, 1e-6),
        "update/compiled": lambda: compiled_update(q, g0, g1, beta),
        "step/ours": our_step(theta, q, g0, g1, state.clone(), losses),
        "step/eager": lambda: eager_step(theta, q, g0, g1, beta),
        "step/tuned": lambda: tuned.step(theta, tuned_q, g0, g1, 1e-6),
        "step/compiled": lambda: compiled_step(theta, q, g0, g1, beta),
    }


def measure(
    candidates: dict[str, Call], size: float, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of every form in every round; they take turns, so that a slow spell hits all of them.

    Small ones (``size`` is a guess of the seconds) run several times between clock readings.
    """
    now = clock()
    for run in candidates.values():
        run()
        run()
    repeat = max(1, int(2e-4 / size))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        for name, run in candidates.items():
            start = now()
            for _ in range(repeat):
                run()
            times[name].append((now() - start) / repeat)
        rounds += 1
    return times


def clock() -> Callable[[], float]:
    """With one thread its own time, which others on the machine take less of."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def steps(numel: Sequence[int], threads: Sequence[int], seconds: float) -> Iterator[Any]:
    """Lines of the table, then the rows."""
    rows = []
    yield "| job | N | threads | ours GB/s | of copy | eager | tuned eager | torch.compile |"
    yield "|---|---|---|---|---|---|---|---|"
    for count in threads:
        torch.set_num_threads(count)
        for n in numel:
            torch._dynamo.reset()
            times = measure(forms(n), n * 2e-9, seconds)
            found = {name: statistics.median(values) for name, values in times.items()}
            copy = COPY_BYTES * n / found["copy"] / 1e9
            for job, size in (("update", UPDATE_BYTES), ("step", STEP_BYTES)):
                ours = found[f"{job}/ours"]
                rate = size * n / ours / 1e9
                ratios = [found[f"{job}/{form}"] / ours for form in ("eager", "tuned", "compiled")]
                cells = [job, f"{n:.0e}", str(count), f"{rate:.1f}", f"{rate / copy:.0%}"]
                yield f"| {' | '.join(cells + [f'{ratio:.1f}×' for ratio in ratios])} |"
            rows.append({"numel": n, "threads": count, "copy_GB/s": copy, "seconds": found})
    yield rows


# --- every op ------------------------------------------------------------------------------------


def compare(job: Job, copy: Call, seconds: float) -> dict[str, Any]:
    """Minima of ours, a copy, and each kind of eager code, of which the fastest form counts."""
    rivals = {
        (kind, name): call for kind, by_name in job.rivals.items() for name, call in by_name.items()
    }
    took, now = {}, clock()
    for key, call in rivals.items():
        call()
        start = now()
        call()
        took[key] = now() - start
    # Those that are far behind needn't be measured well.
    best = {kind: min(t for (k, _), t in took.items() if k == kind) for kind, _ in rivals}
    kept = {key: call for key, call in rivals.items() if took[key] < 1.6 * best[key[0]]}
    size = max(job.bytes * 1e-10, 2e-7)
    times = measure({"copy": copy, "ours": job.ours, **kept}, size, seconds, least=4)
    least = {key: min(values) for key, values in times.items()}
    row = {"op": job.op, "k": job.k, "ours": least["ours"], "copy": least["copy"]}
    row["rivals"] = {
        kind: min((least[key], key[1]) for key in kept if key[0] == kind) for kind in best
    }
    return row


def each(
    numel: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    tensors: int,
    only: Sequence[str] | None,
) -> Iterator[Any]:
    """Lines of the table, then the rows."""
    rows = []
    yield (
        "| op | k | N | threads | ours | GB/s | of copy | tuned eager, float64 sums | float32 sums "
        "| fused SGD |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    ks = sorted({*op_jobs.ROWS, *op_jobs.GRAMS, *op_jobs.PROJECTIONS})
    for count in threads:
        torch.set_num_threads(count)
        for n in numel:
            for k in ks:
                data = op_jobs.Data(n, k, tensors)
                source, target = torch.ones(n), torch.empty(n)
                for make in op_jobs.jobs(data, only):
                    job = make()
                    row = compare(job, lambda a=source, b=target: b.copy_(a), seconds)
                    row |= {"numel": n, "threads": count, "tensors": tensors, "bytes": job.bytes}
                    rows.append(row)
                    yield line(row)
                    del job
                    gc.collect()
                del data, make
                gc.collect()
    yield rows


def line(row: dict[str, Any]) -> str:
    rate = row["bytes"] / row["ours"] / 1e9
    copy = COPY_BYTES * row["numel"] / row["copy"] / 1e9
    moved = [f"{rate:.1f}", f"{rate / copy:.0%}"] if row["bytes"] else ["–", "–"]
    cells = [row["op"], str(row["k"]), f"{row['numel']:.0e}", str(row["threads"])]
    cells += [f"{row['ours'] * 1e3:.3g} ms", *moved]
    rivals = row["rivals"]
    for kinds in (("float64", "eager"), ("float32",), ("fused SGD",)):
        found = [rivals[kind] for kind in kinds if kind in rivals]
        cells.append(f"{found[0][0] / row['ours']:.2f}× ({found[0][1]})" if found else "")
    return f"| {' | '.join(cells)} |"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", choices=["steps", "ops"])
    add("--op", nargs="+", metavar="NAME", help="only these ops")
    add("--numel", type=int, nargs="+", help="parameters (default 1e5 to 1e8, of ops 1e5 to 1e7)")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--tensors", type=int, default=1, help="of every op's θ and g0")
    add("--seconds", type=float, default=10.0, help="of measuring a size; an op has a tenth")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()

    machine = f"{cpu_name()}, {torch.get_num_threads()} cores, torch {torch.__version__}"
    lines = [f"Machine: {machine}, {ops.build_info()['simd']}.", ""]
    kept: dict[str, Any] = {"machine": machine, "build": ops.build_info()}
    sizes = arguments.numel or [10**5, 10**6, 10**7, 10**8]

    def table(name: str, items: Iterator[Any]) -> None:
        for item in items:
            if isinstance(item, str):
                print(item, flush=True)
                lines.append(item)
            else:
                kept[name] = item
        lines.append("")

    if arguments.only != "ops":
        table("steps", steps(sizes, arguments.threads, arguments.seconds))
        lines += ["The last three columns: their time over ours.", ""]
    if arguments.only != "steps":
        sizes = arguments.numel or [10**5, 10**6, 10**7]
        given = (arguments.seconds / 10, arguments.tensors, arguments.op)
        table("ops", each(sizes, arguments.threads, *given))
        lines += [
            "The last three columns: their time over ours. In brackets: how the fastest form went "
            "over the data. Ours sums in float64.",
            "",
        ]
    lines.append("Made by `bench/ops.py`.")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text("\n".join(["# Vector work", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
