"""Eigenvalues of a loss's Hessian: lyapcuda beside PyHessian, hessian-eigenthings, curvlinops.

    python bench/peers.py [--data DIR] [--problems mlp_gelu ...] [--quick] [--out FILE]
    python bench/peers.py --merge FILE.json ... [--out FILE]

The second makes one report of several runs, the last one's where a problem is in more than one.

DIR is a CIFAR-10 folder; without it the pictures are made up. Peers that
aren't installed are listed as such: `pip install --constraint constraints.txt
--no-build-isolation ".[peers]"`.

Every tool measures the same model at the same state on the same batch, and is asked for the same:
the k values of largest magnitude, k = 1 and 5, to a relative error of 1e-3 of each. What counts is
the error against a reference (exact products; float64, but for the ResNets), not a tool's own
tolerance: each tool's settings are tried from loose to tight, and the first is taken that is
accurate enough for every start vector tried (none, where eight counts of products in a row leave
the error as it is). That one is then timed, all tools taking turns.

- Time: of the whole call, set-up included; the least of the rounds, the mean over start vectors.
- Gradient-times: that over one plain forward and backward pass, timed in the same rounds.
- Passes: forward passes of the model and runs of the autograd engine (a plain gradient is 1 + 1; a
  run through a double backward's graph costs about twice a plain one).
- Memory: of a second process for each tool, in which malloc gives everything back at once and huge
  pages are off. It is the most that was resident during the call, less two things: what was held
  before it (libraries, model, batch, and whatever a first call leaves), and code of libraries that
  was loaded during it. No gradient is held before. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ops import cpu_name
from peers_problems import FULL, SPECS
from peers_report import markdown
from peers_tools import TOOLS
from peers_worker import OutOfTime, Worker

HERE = Path(__file__).resolve().parent
TARGET = 1e-3
#: Of a problem's time: until then settings are searched, and the rest is for the rounds.
SEARCH = 0.6
# After so many counts with the same error, within a thousandth, no larger ones are tried.
_SETTLED = 8


@dataclass
class Outcome:
    """A tool on one problem, for one k.

    Attributes:
        status: "reached", "not reached", "kinks" (differences on a loss that has them, at the
            tool's usual setting), "failed", "not installed" or "out of time".
        setting, description: the one that was taken (or came nearest).
        error: relative, the largest of the k values over the start vectors.
        peak: bytes.
        seconds, cpu: of each round, a list per start vector; by the clock, and of all threads.
        tried: (setting, error) of the search.
        message: of an exception.
    """

    status: str = "out of time"
    setting: int | None = None
    description: str = ""
    error: float = math.inf
    forward: float = 0.0
    backward: float = 0.0
    peak: int | None = None
    seconds: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    tried: list[tuple[str, float]] = field(default_factory=list)
    message: str = ""

    @property
    def time(self) -> float | None:
        """Seconds."""
        rounds = [min(times) for times in self.seconds if times]
        return statistics.fmean(rounds) if rounds else None


def relative_error(values: list[float], truth: list[float]) -> float:
    """The largest of the k values, both in the order of their magnitudes."""
    if len(values) < len(truth) or not all(map(math.isfinite, values)):
        return math.inf
    return max(abs(v - t) / abs(t) for v, t in zip(values, truth, strict=False))


def _has_settled(errors: list[float]) -> bool:
    """Whether better settings leave the error as it is: the tool has found another value."""
    last = errors[-_SETTLED:]
    return len(last) == _SETTLED and max(last) < 1.001 * min(last)


@dataclass
class Bench:
    """One run over one problem."""

    name: str
    path: Path
    threads: int
    ks: tuple[int, ...]
    seeds: int
    truth: list[float]
    search_end: float
    end: float

    def search(self, tool: str) -> dict[int, Outcome]:
        """The loosest setting that is accurate enough, for each k, and its memory."""
        outcomes = {k: Outcome() for k in self.ks}
        if TOOLS[tool].versions() is None:
            return {k: Outcome("not installed") for k in self.ks}
        try:
            with Worker(tool, self.name, self.path, 1, frugal=True) as worker:
                worker.answer(self.search_end)
                for k, outcome in outcomes.items():
                    self._search(worker, tool, k, outcome)
                    if outcome.status == "failed":
                        break
        except OutOfTime:
            pass
        except RuntimeError as error:
            for outcome in outcomes.values():
                outcome.status, outcome.message = "failed", str(error)
        first = outcomes[self.ks[0]]
        if first.status == "failed":
            for k in self.ks[1:]:
                outcomes[k] = Outcome("failed", message=first.message)
        return outcomes

    def _search(self, worker: Worker, tool: str, k: int, outcome: Outcome) -> None:
        form = TOOLS[tool]
        kinked = form.usual is not None and not SPECS[self.name].smooth
        for number, setting in enumerate(form.settings):
            if (form.least and setting < 2 * k) or (kinked and setting != form.usual):
                continue
            answers: list[dict[str, Any]] = []
            worst = 0.0
            for seed in range(self.seeds):
                answer = worker.ask(self.search_end, k=k, setting=number, seed=seed)
                if "error" in answer:
                    outcome.status, outcome.message = "failed", answer["error"]
                    return
                answers.append(answer)
                worst = max(worst, relative_error(answer["values"], self.truth[:k]))
                if worst > TARGET:
                    break
            outcome.tried.append((form.describe(setting), worst))
            if worst < outcome.error:
                outcome.setting, outcome.description = number, form.describe(setting)
                outcome.error = worst
                outcome.forward = statistics.fmean(a["forward"] for a in answers)
                outcome.backward = statistics.fmean(a["backward"] for a in answers)
                outcome.peak = max((a["peak"] for a in answers if "peak" in a), default=None)
            if worst <= TARGET:
                outcome.status = "reached"
                return
            if isinstance(setting, int) and _has_settled([error for _, error in outcome.tried]):
                break
        outcome.status = "kinks" if kinked else "not reached"

    def rounds(self, outcomes: dict[str, dict[int, Outcome]], most: int) -> dict[str, list[float]]:
        """Times the settings that were taken, in turns; returns the times of plain gradients."""
        wanted = [
            (tool, k, outcome)
            for tool, by_k in outcomes.items()
            for k, outcome in by_k.items()
            if outcome.status in ("reached", "kinks")
        ]
        wanted.sort(key=lambda entry: entry[1])  # the small k of all tools first
        names = ["gradient", *dict.fromkeys(tool for tool, _, _ in wanted)]
        plain: dict[str, list[float]] = {"seconds": [], "cpu": []}
        for _, _, outcome in wanted:
            outcome.seconds, outcome.cpu = ([[] for _ in range(self.seeds)] for _ in range(2))
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(Worker(name, self.name, self.path, self.threads))
                for name in names
            }
            try:
                for worker in workers.values():
                    worker.answer(self.end)
                for seed in [*range(self.seeds)] * most:
                    answer = workers["gradient"].ask(self.end)
                    for key, times in plain.items():
                        times.append(answer[key])
                    for tool, k, outcome in wanted:
                        answer = workers[tool].ask(
                            self.end, k=k, setting=outcome.setting, seed=seed
                        )
                        outcome.seconds[seed].append(answer["seconds"])
                        outcome.cpu[seed].append(answer["cpu"])
            except OutOfTime:
                pass
        return plain


def measure(
    name: str, arguments: argparse.Namespace, path: Path, start: float, seconds: float
) -> dict[str, Any]:
    """One problem, in so many seconds from the monotonic time ``start``."""
    spec = SPECS[name]
    ks = tuple(k for k in spec.ks if k in arguments.k)

    def once(kind: str, extra: object) -> dict[str, Any]:
        with Worker(kind, name, path, arguments.threads, extra=extra) as worker:
            answer = worker.answer(start + seconds)
        if "error" in answer:
            raise RuntimeError(f"{kind}: {answer['error']}")
        return answer

    about = once("prepare", arguments.data)
    truth = once("reference", max(ks))
    bench = Bench(
        name,
        path,
        arguments.threads,
        ks,
        spec.seeds,
        truth["values"],
        max(start + SEARCH * seconds, time.monotonic() + 0.3 * seconds),
        start + seconds,
    )
    tools = [t for t in arguments.tools or TOOLS if TOOLS[t].only in (None, name)]
    if name.startswith("resnet") and not arguments.tools:
        tools = [t for t in tools if t != "ours_scipy"]  # no time for them
    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        # Peers first: should the time not do, they had more of it.
        order = sorted(tools, key=lambda tool: TOOLS[tool].ours)
        found = dict(zip(order, pool.map(bench.search, order), strict=True))
        outcomes = {tool: found[tool] for tool in tools}
        gradient = pool.submit(_gradient_memory, bench).result()
    plain = bench.rounds(outcomes, arguments.rounds)
    return {
        "name": name,
        "spec": asdict(spec),
        "about": about,
        "reference": truth,
        "gradient": {**plain, "peak": gradient},
        "tools": {
            tool: {str(k): {**asdict(o), "time": o.time} for k, o in by_k.items()}
            for tool, by_k in outcomes.items()
        },
        "seconds": time.monotonic() - start,
    }


def write(report: dict[str, Any], out: Path) -> None:
    """OUT.json and OUT.md."""
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(report, __doc__))


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several, problems in the usual order; of the same problem, the last is taken.

    Raises:
        ValueError: they were made in other ways.
    """
    for key in ("machine", "threads", "target", "k"):
        found = [report[key] for report in reports]
        if any(value != found[0] for value in found):
            raise ValueError(f"--merge: reports of different {key}: {found}")
    problems = {problem["name"]: problem for report in reports for problem in report["problems"]}
    return {
        **reports[0],
        "load": max(report["load"] for report in reports),
        "versions": {
            tool: next((r["versions"][tool] for r in reports if r["versions"].get(tool)), None)
            for tool in TOOLS
        },
        "problems": [problems[name] for name in SPECS if name in problems],
    }


def _gradient_memory(bench: Bench) -> int | None:
    with Worker("gradient", bench.name, bench.path, 1, frugal=True) as worker:
        worker.answer(bench.end)
        return worker.ask(bench.end).get("peak")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a CIFAR-10 folder")
    add("--problems", nargs="+", choices=list(SPECS), default=list(FULL))
    add("--tools", nargs="+", choices=list(TOOLS))
    add("-k", type=int, nargs="+", default=[1, 5])
    add("--threads", type=int, default=torch.get_num_threads(), help="of the timed calls")
    add("--rounds", type=int, default=5, help="at most")
    add("--minutes", type=float, default=8.5, help="for everything")
    add("--quick", action="store_true", help="a tiny problem only, in seconds")
    add("--merge", type=Path, nargs="+", metavar="JSON", help="only make one report of these")
    add("--out", type=Path, default=HERE / "results" / "peers", help="OUT.md and OUT.json")
    arguments = parser.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.merge:
        write(merged([json.loads(path.read_text()) for path in arguments.merge]), arguments.out)
        return
    if arguments.quick:
        arguments.problems = ["small"]
    machine = f"{cpu_name()} ({os.cpu_count()} cores), torch {torch.__version__}"
    report: dict[str, Any] = {
        "machine": machine,
        "threads": arguments.threads,
        "target": TARGET,
        "k": arguments.k,
        "versions": {tool: form.versions() for tool, form in TOOLS.items()},
        "load": os.getloadavg()[0],
        "problems": [],
    }
    end = time.monotonic() + 60 * arguments.minutes
    left = list(arguments.problems)
    with tempfile.TemporaryDirectory() as folder:
        while left:
            start = time.monotonic()
            # What an earlier problem has left over goes to the later ones.
            share = SPECS[left[0]].share / sum(SPECS[name].share for name in left)
            name = left.pop(0)
            path = Path(folder) / f"{name}.pt"
            try:
                found = measure(name, arguments, path, start, share * (end - start))
            except (OutOfTime, RuntimeError) as error:
                found = {"name": name, "spec": asdict(SPECS[name]), "failed": repr(error)}
            report["problems"].append(found)
            print(markdown({**report, "problems": [found]}, "").strip(), flush=True)
            write(report, arguments.out)


if __name__ == "__main__":
    main()
