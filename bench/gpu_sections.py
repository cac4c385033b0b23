"""The bench sections of gpu_report.py, each run as a process of its own.

    python bench/gpu_sections.py NAME --out FILE.json --seconds S [--rehearse]

GB/s are the bytes that have to move over the time taken, whatever a form really moves. The copy is
torch.ops.lyapcuda.stream_copy_ of as many bytes, in the same round.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import gpt as gpt_model  # noqa: E402
import gpu_panels  # noqa: E402
import lyapcuda  # noqa: E402
import ops as cpu_bench  # noqa: E402
from gpu_timing import Bench, gb  # noqa: E402
from lyapcuda import ops  # noqa: E402
from lyapcuda.experiment.models import build  # noqa: E402


def sizes(bench: Bench) -> list[int]:
    """The most telling first: time may run out."""
    return [1003, 4096] if bench.rehearse else [10**8, 10**7, 10**9, 10**6]


def device(bench: Bench) -> None:
    """What this is, and what a copy makes of it."""
    about: dict[str, object] = {"device": "CPU (rehearsal)", "torch": torch.__version__}
    peak = None
    if not bench.rehearse:
        found = torch.cuda.get_device_properties(0)
        about |= {
            "device": found.name,
            "processors": found.multi_processor_count,
            "memory_GB": round(found.total_memory / 1e9, 1),
            "L2_MB": getattr(found, "L2_cache_size", 0) / 1e6,
            "cuda": torch.version.cuda,
        }
        clock, width = (getattr(found, n, 0) for n in ("memory_clock_rate", "memory_bus_width"))
        peak = 2e3 * clock * width / 8 or None  # kHz, bits, two transfers a clock
    about["build"] = ops.build_info()
    about["peak_GB/s"] = None if peak is None else round(peak / 1e9, 1)
    n = sizes(bench)[0]
    a, b = torch.randn(n, device=bench.device), torch.empty(n, device=bench.device)
    forms = {"stream_copy_": [lambda: ops.stream_copy_(b, a)], "torch copy_": [lambda: b.copy_(a)]}
    seconds, spread = bench.compare(forms)
    for name, value in seconds.items():
        about[f"{name} GB/s"] = round(gb(8 * n, value), 1)
    about["spread"] = spread
    bench.rows.append(about)
    bench.lines += [f"{name}: {value}  " for name, value in about.items()]
    bench.save()


# --- vector work of one separation ---------------------------------------------------------------


def one_separation(
    bench: Bench, n: int, storage: torch.dtype
) -> tuple[dict[str, list[Callable[[], object]]], dict[str, float]]:
    """Each op in calls on several sets of data, and the bytes it has to move."""
    of = storage.itemsize
    size = {"copy": 8.0, "ascent_": 8 + 2 * of, "ascent_ realised": 8 + 3 * of}
    size |= {"ascent_ momentum": 16 + 2 * of, "recenter_": 4 + 2 * of, "descend_": 3 * of}
    count = bench.sets(n * (24 + 4 * of))
    calls: dict[str, list[Callable[[], object]]] = {name: [] for name in size}
    for _ in range(count):
        q, d, p, p_next = (torch.randn(n, device=bench.device) * 1e-3 for _ in range(4))
        g0, theta, theta1 = (torch.randn(n, device=bench.device).to(storage) for _ in range(3))
        g1 = (g0 + 1e-2 * torch.randn_like(g0)).to(storage)
        state = ops.new_state(
            bench.device, perturbation=1e-2, scale=1.0, beta=0.5, h_ema=1e3, accepted=1.0
        )
        step = (d, q, [g0], [g1], [0], state)
        heavy = {"momentum": 0.9, "p": p, "p_next": p_next}
        calls["copy"].append(lambda d=d, q=q: ops.stream_copy_(d, q))
        calls["ascent_"].append(lambda s=step: ops.ascent_(*s))
        calls["ascent_ realised"].append(lambda s=step, t=theta: ops.ascent_(*s, theta=[t]))
        calls["ascent_ momentum"].append(lambda s=step, h=heavy: ops.ascent_(*s, **h))
        calls["recenter_"].append(
            lambda to=theta1, q=q, d=d, t=theta, s=state: ops.recenter_([to], q, d, [t], [0], s)
        )
        calls["descend_"].append(
            lambda t=theta, g=g0, s=state: ops.descend_([t], [g], s, max_lr=1e-9)
        )
    return {name: found for name, found in calls.items() if found}, size


def against_torch(bench: Bench, n: int) -> None:
    """The two jobs of bench/ops.py, in its four forms."""
    calls: dict[str, list[Callable[[], object]]] = {}
    torch._dynamo.reset()
    compiled_update = bench.compile(cpu_bench.eager_update)
    compiled_step = bench.compile(cpu_bench.eager_step)

    def add(name: str, call: Callable[[], object]) -> None:
        calls.setdefault(name, []).append(call)

    for _ in range(bench.sets(n * 28)):
        theta, g0 = (torch.randn(n, device=bench.device) for _ in range(2))
        q = torch.randn(n, device=bench.device) * (cpu_bench.SIZE / n**0.5)
        g1, d = g0 + 1e-3 * q, torch.empty_like(q)
        state = ops.new_state(bench.device, perturbation=cpu_bench.SIZE, scale=1.0, beta=0.5)
        losses = torch.zeros(2, dtype=torch.float64, device=bench.device)
        tuned, tuned_q, turns = cpu_bench.Tuned(q), q.clone(), [(q.clone(), d)]

        def our_step(turns=turns, theta=theta, g0=g0, g1=g1, state=state, losses=losses) -> None:
            here, other = turns[0]
            ops.recenter_([other], here, other, [theta], [0], state)
            sums = ops.ascent_(other, here, [g0], [g1], [0], state)
            ops.exponent_(state, sums, losses, control=False)
            turns[0] = (other, here)

        data, whole = (q, g0, g1, 0.5), (theta, q, g0, g1, 0.5)
        add("copy", lambda d=d, q=q: ops.stream_copy_(d, q))
        add("update/ours", lambda d=d, s=(q, [g0], [g1], [0], state): ops.ascent_(d, *s))
        add("update/eager", lambda s=data: cpu_bench.eager_update(*s))
        add("update/tuned", lambda t=tuned, s=(tuned_q, g0, g1, 1e-6): t.update(*s))
        add("update/compiled", lambda s=data: compiled_update(*s))
        add("step/ours", our_step)
        add("step/eager", lambda s=whole: cpu_bench.eager_step(*s))
        add("step/tuned", lambda t=tuned, s=(theta, tuned_q, g0, g1, 1e-6): t.step(*s))
        add("step/compiled", lambda s=whole: compiled_step(*s))
    seconds, spread = bench.compare(calls)
    copy = gb(cpu_bench.COPY_BYTES * n, seconds["copy"])
    for job, size in (("update", cpu_bench.UPDATE_BYTES), ("step", cpu_bench.STEP_BYTES)):
        ours = seconds.get(f"{job}/ours")
        if ours is None:  # there is a note
            continue
        rate = gb(size * n, ours)
        others = [seconds.get(f"{job}/{form}") for form in ("eager", "tuned", "compiled")]
        bench.row(
            [job, f"{n:.0e}", f"{ours * 1e6:.1f}", f"{rate:.0f}", f"{rate / copy:.0%}"]
            + ["-" if other is None else f"{other / ours:.1f}×" for other in others],
            job=job,
            numel=n,
            seconds=seconds,
            spread=spread,
        )


def vector_ops(bench: Bench) -> None:
    columns = ("eager", "tuned eager", "torch.compile")
    bench.head("job", "N", "ours µs", "GB/s", "of copy", *columns)
    for n in sizes(bench):
        if bench.left() < 8 and not bench.rehearse:
            bench.note(f"against torch at N = {n:.0e}: left out, no time")
            continue
        if n * 4 * 12 > bench.free():
            bench.note(f"against torch at N = {n:.0e}: left out, no memory")
            continue
        against_torch(bench, n)
        bench.release()
    bench.lines += ["", "The last three columns: their time over ours (`bench/ops.py`).", ""]
    bench.head("op", "N", "storage", "µs", "GB/s", "of copy")
    for storage in (torch.float32, torch.bfloat16):
        for n in sizes(bench):
            label = f"{str(storage).removeprefix('torch.')} at N = {n:.0e}"
            if bench.left() < 3 and not bench.rehearse:
                bench.note(f"{label}: left out, no time")
                continue
            if n * (24 + 4 * storage.itemsize) * 1.5 > bench.free():
                bench.note(f"{label}: left out, no memory")
                continue
            calls, size = one_separation(bench, n, storage)
            seconds, spread = bench.compare(calls, most=0.1)
            copy = gb(8 * n, seconds["copy"])
            for name, value in seconds.items():
                rate = gb(size[name] * n, value)
                bench.row(
                    [name, f"{n:.0e}", str(storage).removeprefix("torch."), f"{value * 1e6:.1f}"]
                    + [f"{rate:.0f}", f"{rate / copy:.0%}"],
                    op=name,
                    numel=n,
                    storage=str(storage),
                    seconds=value,
                    bytes=size[name] * n,
                    spread=spread,
                )
            calls.clear()
            gc.collect()
            bench.release()


# --- whole steps ---------------------------------------------------------------------------------


def whole_step(bench: Bench, model: nn.Module, closure: Callable[[], Tensor]) -> None:
    """A plain training step, one gradient more, and a tracked one."""
    parameters = list(model.parameters())
    numel = sum(p.numel() for p in parameters)
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

    forms: dict[str, Callable[[], object]] = {"plain": plain, "one gradient": gradient}
    forms |= {name: lambda name=name: tracked(name) for name in trackers}
    # Several steps between two clock readings; every=10 has to measure once in each.
    several = {name: 10 if "every" in name else 5 for name in forms}
    calls = {
        name: [lambda form=form, n=several[name]: [form() for _ in range(n)]]
        for name, form in forms.items()
    }
    totals, spread = bench.compare(calls, most=min(1.5, max(bench.left() / 16, 0.05)), queue=1)
    seconds = {name: total / several[name] for name, total in totals.items()}
    bench.lines += [f"{numel / 1e6:.1f} million parameters.", ""]
    bench.head("step", "ms", "over a plain one", "beyond plain + one gradient, ms")
    for name, value in seconds.items():
        beyond = value - seconds["plain"] - seconds["one gradient"]
        bench.row(
            [name, f"{value * 1e3:.2f}", f"{value / seconds['plain'] - 1:+.1%}"]
            + [f"{beyond * 1e3:+.2f}" if name == "tracked" else "-"],
            step=name,
            seconds=value,
            numel=numel,
            spread=spread,
        )
    h = float(trackers["tracked"].h)
    bench.note(f"h after {float(trackers['tracked'].steps):.0f} measurements: {h:.4g}")
    if h != h:
        raise RuntimeError("the tracker has measured nothing")


def resnet18(bench: Bench) -> None:
    batch, size = (4, 8) if bench.rehearse else (512, 32)
    torch.manual_seed(0)
    model = build("resnet0" if bench.rehearse else "resnet18", 3, size, 10).to(bench.device)
    x = torch.randn(batch, 3, size, size, device=bench.device)
    y = torch.randint(0, 10, (batch,), device=bench.device)
    bench.lines += [f"ResNet-18 for CIFAR's shape, batch {batch}, float32, SGD.", ""]
    whole_step(bench, model, lambda: nn.functional.cross_entropy(model(x), y))


def gpt(bench: Bench) -> None:
    shape = dict(vocabulary=64, length=16, width=16, heads=2, depth=1) if bench.rehearse else {}
    batch, length = (2, 16) if bench.rehearse else (8, 1024)
    torch.manual_seed(0)
    model = gpt_model.GPT(**shape).to(bench.device)
    tokens = torch.randint(0, model.tokens.num_embeddings, (batch, length + 1), device=bench.device)

    def closure() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return gpt_model.loss_of(model, tokens)

    bench.lines += [f"GPT, {batch} × {length} tokens, bfloat16 autocast, SGD.", ""]
    whole_step(bench, model, closure)


# --- CUDA graphs ---------------------------------------------------------------------------------


def graphs(bench: Bench) -> None:
    """Two steps (the buffers change places) one by one, and as a graph."""
    bench.head("N", "tensors", "two steps, µs", "as a graph, µs")
    for n, tensors in [(10**5, 1), (10**5, 60), (10**6, 60), (10**7, 60)]:
        n = 600 if bench.rehearse else n
        if bench.left() < 2 and not bench.rehearse:
            bench.note(f"graphs at N = {n:.0e}: left out, no time")
            continue
        length = n // tensors
        offsets = [i * length for i in range(tensors)]
        q = torch.randn(n, device=bench.device) * 1e-3
        d = torch.empty_like(q)
        theta, g0 = ([torch.randn(length, device=bench.device) for _ in offsets] for _ in "tg")
        theta1 = [torch.empty_like(t) for t in theta]
        g1 = [g + 1e-3 * torch.randn_like(g) for g in g0]
        state = ops.new_state(bench.device, perturbation=1e-2, scale=1.0, beta=0.5)
        losses = torch.zeros(2, dtype=torch.float64, device=bench.device)

        def steps(
            q=q, d=d, theta=theta, theta1=theta1, g0=g0, g1=g1, state=state, losses=losses,
            offsets=offsets,
        ) -> None:  # fmt: skip
            for here, there in ((q, d), (d, q)):
                sums = ops.ascent_(there, here, g0, g1, offsets, state)
                ops.exponent_(state, sums, losses, control=False)
                ops.recenter_(theta1, there, here, theta, offsets, state)

        replay = steps
        if not bench.rehearse:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                steps()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                steps()
            replay = graph.replay
        seconds, spread = bench.compare({"eager": [steps], "graph": [replay]})
        bench.row(
            [f"{n:.0e}", str(tensors), f"{seconds['eager'] * 1e6:.1f}"]
            + [f"{seconds['graph'] * 1e6:.1f}"],
            numel=n,
            tensors=tensors,
            seconds=seconds,
            spread=spread,
        )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "device": device,
    "ops": vector_ops,
    "panels": gpu_panels.panels,
    "resnet18": resnet18,
    "gpt": gpt,
    "graphs": graphs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.out, options.seconds, options.rehearse)
    bench.save()
    SECTIONS[options.name](bench)
    bench.save()


if __name__ == "__main__":
    main()
