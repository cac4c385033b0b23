"""LyapunovSGD and CDAT beside SGD, Adam and the optimizers that need no learning rate.

    python bench/optimizers.py --data DIR [--out OUT] [--problems MLP ...] [--methods SGD ...]

Every method starts from the same parameters and sees the same minibatches: scikit-learn's digits,
and, where --data names a CIFAR-10 folder, its planes and cars. Losses are means over the last 20
minibatches and over seeds. "By gradients" is the loss when a run has spent as many gradients as SGD
did in all its steps, warm-ups and checks included ("none left": those took them all). "Diverged":
some seed's loss isn't finite, or ends above twice its first one.

SGD, SGD with momentum 0.9 and Adam get the best of four learning rates for each problem, by the
loss after all steps: those rows are the best of four runs. All other methods have one setting for
all problems. The last two problems are ones that no setting of LyapunovSGD's was chosen on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import lyapcuda
from examples.paper.data import BatchLoader, Dataset, load
from lyapcuda import LyapunovSGD
from ops import cpu_name
from optimizer_problems import PROBLEMS, Problem

WINDOW = 20
#: (gradients spent, loss) after every step.
Run = list[tuple[int, float]]


# --- methods -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """An optimizer of one setting, or of several to take the best of.

    Attributes:
        settings: name → makes the optimizer.
        evaluates: its step takes the closure.
    """

    name: str
    settings: dict[str, Callable[[nn.Module], Optimizer]]
    evaluates: bool = False

    @property
    def title(self) -> str:
        count = len(self.settings)
        return self.name if count == 1 else f"{self.name}, best of {count}"


def over_rates(name: str, kind: type[Optimizer], *rates: float, **options: float) -> Method:
    def at(rate: float) -> Callable[[nn.Module], Optimizer]:
        return lambda model: kind(model.parameters(), lr=rate, **options)

    return Method(name, {f"{rate:g}" if len(rates) > 1 else "": at(rate) for rate in rates})


def ours(name: str, **options: object) -> Method:
    return Method(name, {"": lambda model: LyapunovSGD(model.parameters(), **options)}, True)


def along_adam(every: int) -> Method:
    def make(model: nn.Module) -> Optimizer:
        return lyapcuda.CDAT(Adam(model.parameters()), every=every)

    return Method(f"CDAT(Adam), every {every}", {"": make}, True)


def peers() -> list[Method]:
    """Those that are installed."""
    found = []
    if find_spec("prodigyopt"):
        from prodigyopt import Prodigy

        found.append(over_rates("Prodigy, rate 1", Prodigy, 1.0))
    if find_spec("schedulefree"):
        from schedulefree import AdamWScheduleFree, SGDScheduleFree

        found.append(over_rates("schedule-free SGD, rate 1", SGDScheduleFree, 1.0))
        found.append(over_rates("schedule-free AdamW, rate 0.0025", AdamWScheduleFree, 0.0025))
    return found


def methods() -> list[Method]:
    found = [
        over_rates("SGD", SGD, 0.03, 0.1, 0.3, 1.0),
        over_rates("SGD m = 0.9", SGD, 0.009, 0.03, 0.09, 0.3, momentum=0.9),
        over_rates("Adam", Adam, 3e-4, 1e-3, 3e-3, 1e-2),
        *peers(),
        ours("LyapunovSGD"),
        ours("LyapunovSGD, gain 1", gain=1.0),
        ours("LyapunovSGD, every 5", every=5),
        ours("LyapunovSGD, k = 5", k=5),
        ours("LyapunovSGD, the paper's", estimate="paper"),
    ]
    if hasattr(lyapcuda, "CDAT"):
        found += [along_adam(1), along_adam(5)]
    return found


# --- runs ----------------------------------------------------------------------------------------


class Counted:
    """A closure that counts how often it is called."""

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        self.model, self.problem, self.calls = model, problem, 0

    def at(self, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            return self.problem.loss(self.model, *batch)

        return closure


def run(
    make: Callable[[nn.Module], Optimizer],
    evaluates: bool,
    problem: Problem,
    dataset: Dataset,
    seed: int,
) -> Run:
    torch.manual_seed(seed)
    net = problem.model(dataset)
    loader = BatchLoader(dataset, problem.batch, seed, False)
    optimizer, counted, out = make(net), Counted(net, problem), []
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    for _ in range(problem.steps):
        closure = counted.at(loader.next())
        if evaluates:
            loss = float(optimizer.step(closure))
        else:
            optimizer.zero_grad()
            value = closure()
            value.backward()
            optimizer.step()
            loss = float(value.detach())
        out.append((counted.calls, loss))
        if not math.isfinite(loss):
            break
    return out


def loss_after(run: Run, gradients: float = math.inf) -> float:
    """The mean over the last minibatches within so many gradients; inf: it diverged."""
    losses = [loss for spent, loss in run if spent <= gradients]
    if not losses:
        return math.nan
    if not all(map(math.isfinite, losses)):
        return math.inf
    mean = statistics.fmean(losses[-WINDOW:])
    return math.inf if mean > 2 * losses[0] else mean


@dataclass(frozen=True)
class Result:
    """Of a method on a problem: its losses, gradients spent in all steps, the best setting."""

    by_steps: float
    by_gradients: float
    gradients: int
    setting: str


def result_of(method: Method, problem: Problem, dataset: Dataset, seeds: int) -> Result:
    def of(setting: str) -> Result:
        runs = [
            run(method.settings[setting], method.evaluates, problem, dataset, seed)
            for seed in range(seeds)
        ]
        by_steps = statistics.fmean(loss_after(r) for r in runs)
        by_gradients = statistics.fmean(loss_after(r, problem.steps) for r in runs)
        return Result(by_steps, by_gradients, max(r[-1][0] for r in runs), setting)

    return min(map(of, method.settings), key=lambda found: found.by_steps)


# --- report --------------------------------------------------------------------------------------

#: Method → problem → result.
Results = dict[str, dict[str, Result]]


def number(value: float) -> str:
    if math.isnan(value):
        return "none left"
    return "diverged" if math.isinf(value) else f"{value:.2g}"


def cell(found: Result | None) -> str:
    if found is None:
        return ""
    by_steps, by_gradients = number(found.by_steps), number(found.by_gradients)
    text = by_steps if by_steps == by_gradients else f"{by_steps} / {by_gradients}"
    return f"{text} ({found.setting})" if found.setting else text


def within(results: Results, name: str, than: str, factor: float, kind: str) -> str | None:
    """On how many problems a method's loss is within so many times another's."""
    mine, theirs = results.get(name, {}), results.get(than, {})
    held_out = {p.name for p in PROBLEMS if p.held_out}
    counts = []
    for of, chosen in (("", set(mine) - held_out), (" held-out ones", set(mine) & held_out)):
        both = sorted(chosen & set(theirs))
        good = sum(getattr(mine[p], kind) <= factor * theirs[p].by_steps for p in both)
        counts.append(f"{good} of {len(both)}{of}")
    if not mine or not theirs:
        return None
    by = kind.replace("_", " ")
    return f"- {name}, {by}: within {factor:g} times {than}: {counts[0]}, {counts[1]}."


def report(results: Results, heading: list[str]) -> str:
    problems = [p for p in PROBLEMS if any(p.name in found for found in results.values())]
    lines = [*heading, "| | " + " | ".join(p.name for p in problems) + " |"]
    lines.append("|---" * (len(problems) + 1) + "|")
    order = [method.title for method in methods()]
    order += sorted(set(results) - set(order))  # of packages that aren't here
    for name, found in sorted(results.items(), key=lambda row: order.index(row[0])):
        lines.append(f"| {name} | " + " | ".join(cell(found.get(p.name)) for p in problems) + " |")
    lines.append("")
    sgd, adam = "SGD m = 0.9, best of 4", "Adam, best of 4"
    for name in results:
        if name.startswith("LyapunovSGD"):
            lines.append(within(results, name, sgd, 1.5, "by_steps"))
        if name.startswith("CDAT"):
            lines.append(within(results, name, adam, 1.2, "by_gradients"))
    return "\n".join(line for line in lines if line is not None) + "\n"


def heading(seeds: int, missing: list[str]) -> list[str]:
    lines = ["# Optimizers", "", f"Machine: {cpu_name()}, one thread; {seeds} seeds."]
    lines[-1] += " Made by `python bench/optimizers.py --data DIR`."
    lines += ["", *(" ".join(part.split()) + "\n" for part in __doc__.split("\n\n")[2:])]
    lines.append(
        "Cells: by steps / by gradients, one number where they agree (best learning rate)."
    )
    if missing:
        lines.append(f"\nNot installed, so left out: {', '.join(missing)}.")
    return [*lines, ""]


def read(out: Path) -> Results:
    path = out.with_suffix(".json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {m: {p: Result(**values) for p, values in row.items()} for m, row in kept.items()}


def write(results: Results, out: Path, heading: list[str]) -> None:
    out.with_suffix(".md").write_text(report(results, heading))
    kept = {m: {p: vars(r) for p, r in row.items()} for m, row in results.items()}
    out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="a CIFAR-10 folder; without it the digits alone")
    add("--problems", nargs="+", help="those whose names begin with one of these")
    add("--methods", nargs="+", help="those whose names begin with one of these")
    add("--seeds", type=int, default=2)
    add("--out", type=Path, help="write OUT.json and OUT.md after every cell")
    add("--resume", action="store_true", help="keep the cells that OUT.json has")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def asked(name: str, parts: list[str] | None) -> bool:
        return parts is None or name.startswith(tuple(parts))

    missing = [name for name in ("prodigyopt", "schedulefree") if not find_spec(name)]
    datasets = {False: load("digits")}
    if arguments.data:
        datasets[True] = load(arguments.data, (0, 1))
    results = read(arguments.out) if arguments.out and arguments.resume else {}
    for problem in PROBLEMS:
        if problem.cifar not in datasets or not asked(problem.name, arguments.problems):
            continue
        for method in methods():
            done = problem.name in results.get(method.title, {})
            if done or not asked(method.name, arguments.methods):
                continue
            found = result_of(method, problem, datasets[problem.cifar], arguments.seeds)
            results.setdefault(method.title, {})[problem.name] = found
            print(f"{problem.name:18} {method.name:32} {cell(found)}", flush=True)
            if arguments.out:
                write(results, arguments.out, heading(arguments.seeds, missing))


if __name__ == "__main__":
    main()
