"""Is what eigsh calls converged true on the nets most people have? Against dense Hessians.

    python bench/hard_truth.py [--quick] [--seeds 0:3] [--families relu noise ...] [--modes default]
        [--processes 2] [--out bench/results/hard_truth]
    python bench/hard_truth.py --check

Families of small problems, a seed each (bench/hard_problems.py): kinks that autograd's graph shows
or hides, backward passes that hide or falsify something, losses with noise, spectra with zeros and
multiple values, autocast. Each is asked for several values at each end; float32 with tol 1e-3 and
float64 with tol 1e-6; in eigsh's default mode and in the others. The truth is the dense Hessian at
the parameters in float64, by double backward of an equivalent loss that is written plainly. A loss
that is another at each evaluation has none, nor has a gradient that is no loss's. Counted are

- converged: of the values returned, those called so;
- wrong: of these the ones further than three tolerances (relative) from the exact i-th wanted
  value, and all where there is no truth. What is zero, up to ‖H‖·tol/10, may be off by so much;
- empty: intervals that hold no exact eigenvalue, converged or not;
- open: values not called converged;
- silent: runs that left a value open and gave no ConvergenceWarning;
- raised: runs that ended with an exception;
- exact: runs that went by exact products;

and the median of the gradient evaluations a run. method="lyapunov" is asked less, in the default
mode only. The exit status is 1 where a value is wrong, or where the default mode raised: a run that
raises has no values, and so none that is wrong.

The second call shows that the truths are true: it compares each with central differences of the
closure's own gradient, in float64.
"""

from __future__ import annotations

import argparse
import inspect
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# This checkout's package, whatever else is installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import lyapcuda  # noqa: E402
from hard.problem import Family, Problem  # noqa: E402
from hard_problems import FAMILIES  # noqa: E402
from ops import cpu_name  # noqa: E402
from truths import wanted  # noqa: E402

if not Path(lyapcuda.__file__).is_relative_to(ROOT):
    raise ImportError(f"lyapcuda comes from {lyapcuda.__file__}, not from {ROOT}")

#: eigsh's own choice, by name, comes first.
DEFAULT = inspect.signature(lyapcuda.HessianOperator).parameters["mode"].default
MODES = tuple(dict.fromkeys((DEFAULT, "exact", "difference")))
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}
#: Of a row's wrong values so many are shown.
SHOWN = 3
QUICK = (("LA", 1), ("SA", 1), ("BE", 5))
COLUMNS = ("values", "converged", "wrong", "empty", "open", "silent", "raised", "exact")


@dataclass
class Row:
    """The runs of one family, precision and mode."""

    kind: str
    name: str
    dtype: str
    mode: str
    counts: Counter[str] = field(default_factory=Counter)
    gradients: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        gradients = f"{statistics.median(self.gradients):.0f}" if self.gradients else ""
        errors = ", ".join(f"{count} {name}" for name, count in self.errors.items())
        return [*(str(self.counts[column]) for column in COLUMNS), gradients, errors]


# --- one run --------------------------------------------------------------------------------------


def scale_of(problem: Problem, exact: Tensor) -> float:
    """‖H‖; where it is zero, the size that a Hessian could have: ‖g‖/‖θ‖."""
    norm = float(exact.abs().max())
    if norm > 0:
        return norm
    size = sum(float(p.detach().double().square().sum()) for p in problem.params)
    return float(gradient(problem).norm()) / math.sqrt(size)


def is_wrong(value: float, right: float, exact: Tensor, scale: float, tol: float, lm: bool) -> bool:
    """Whether a converged value isn't the wanted one."""
    zero = tol * scale / 10
    slack = max(3 * tol * abs(right), zero if abs(right) <= zero else 0.0)
    if lm:  # by magnitude −a and a are a tie
        off = max(float((exact - value).abs().min()), abs(abs(value) - abs(right)))
    else:
        off = abs(value - right)
    return not off <= slack


def judge(
    row: Row, problem: Problem, result: lyapcuda.EigenResult, exact: Tensor | None, label: str
) -> None:
    """Counts one result."""
    values = result.eigenvalues.tolist()
    right = [math.nan] * len(values)
    scale = 0.0
    if exact is not None:
        right = wanted(exact, len(values), result.which).tolist()
        scale = scale_of(problem, exact)
    rounding = 10 * torch.finfo(result.eigenvectors.dtype).eps * scale
    for i, value in enumerate(values):
        converged = bool(result.converged[i])
        row.counts["values"] += 1
        row.counts["converged" if converged else "open"] += 1
        wrong = converged
        if exact is not None:
            low, high = result.interval[i].tolist()
            holds = (exact >= low - rounding) & (exact <= high + rounding)
            row.counts["empty"] += not bool(holds.any())
            lm = result.which == "LM"
            wrong &= is_wrong(value, right[i], exact, scale, result.tol, lm)
        row.counts["wrong"] += wrong
        if wrong:
            how = getattr(result, "reason", result.difference)
            row.remarks.append(f"{label}, value {i}: {value:.7g} for {right[i]:.7g} ({how})")


def measure(row: Row, problem: Problem, exact: Tensor | None, label: str, **options: Any) -> None:
    """Runs eigsh once and counts what it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = lyapcuda.eigsh(problem.closure, problem.params, **options, **problem.options)
        except Exception as error:  # whatever it is belongs into the table
            row.counts["raised"] += 1
            row.errors[type(error).__name__] += 1
            return
    warned = any(issubclass(w.category, lyapcuda.ConvergenceWarning) for w in caught)
    row.counts["silent"] += not warned and not bool(result.converged.all())
    row.counts["exact"] += result.difference == "exact"
    row.gradients.append(result.gradient_evaluations)
    judge(row, problem, result, exact, label)


# --- a family -------------------------------------------------------------------------------------


def sweep(number: int, seeds: Sequence[int], modes: Sequence[str], quick: bool) -> list[Row]:
    """Every run of one family."""
    torch.set_num_threads(1)
    family = FAMILIES[number]
    rows: dict[tuple[str, str], Row] = {}
    for seed in seeds:
        for dtype in family.dtypes:
            short = str(dtype).removeprefix("torch.")
            first = family.make(seed, dtype)
            truths = {
                mode: first.exact_truth if mode == "exact" and first.exact_truth else first.truth
                for mode in modes
            }
            known = {t: t() for t in dict.fromkeys(truths.values()) if t is not None}
            for mode, method, which, k in _runs(family, modes, quick):
                title = mode if method == "lanczos" else f"{mode}, {method}"
                row = rows.setdefault((short, title), Row(family.kind, family.name, short, title))
                problem = family.make(seed, dtype) if family.fresh else first
                truth = truths[mode]
                exact = None if truth is None else known[truth]
                label = f"{family.name} {seed}, {short}, {title}, {which}, k={k}"
                options: dict[str, Any] = {} if mode == DEFAULT else {"mode": mode}
                options |= dict(k=k, which=which, method=method, seed=seed, tol=TOLERANCES[dtype])
                measure(row, problem, exact, label, **options)
    return list(rows.values())


def _runs(family: Family, modes: Sequence[str], quick: bool) -> Iterable[tuple[str, str, str, int]]:
    """(mode, method, which, k)"""
    few = [ask for ask in family.asks if ask in QUICK]
    asks = few if quick and len(few) > 1 else family.asks
    for mode in modes:
        yield from ((mode, "lanczos", which, k) for which, k in asks)
    if DEFAULT in modes:
        yield from ((DEFAULT, "lyapunov", which, k) for which, k in family.climbs)


def gradient(problem: Problem) -> Tensor:
    """g(θ) as training has it, by backward()."""
    for p in problem.params:
        p.grad = None
    loss = problem.closure()
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.params]
    for p in problem.params:
        p.grad = None
    return torch.cat([g.flatten() for g in found])


def central_matrix(problem: Problem, size: float = 1e-6) -> Tensor:
    """The Hessian by central differences of the closure's gradient."""
    rows = []
    for flat in [p.detach().view(-1) for p in problem.params]:
        for i in range(len(flat)):
            value, ends = float(flat[i]), []
            for sign in (1, -1):
                flat[i] = value + sign * size
                ends.append(gradient(problem))
            flat[i] = value
            rows.append((ends[0] - ends[1]) / (2 * size))
    return torch.stack(rows)


def check(number: int, seeds: Sequence[int]) -> list[str]:
    """Lines about the truth of one family; those with a ! differ."""
    torch.set_num_threads(1)
    family, lines = FAMILIES[number], []
    for seed in seeds if family.plain else ():
        problem = family.make(seed, torch.float64)
        assert problem.truth is not None
        exact, matrix = problem.truth(), central_matrix(problem)
        found = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        scale = max(scale_of(problem, exact), 1e-300)
        off = float((found - exact).abs().max()) / scale
        mark = " !" if off > 1e-5 else ""
        lines.append(
            f"{family.name} {seed}: n = {len(exact)}, off by {off:.1e} of {scale:.3g}{mark}"
        )
    return lines


# --- the report -----------------------------------------------------------------------------------


def table(rows: Iterable[Row], head: Sequence[str], first: Sequence[Sequence[str]]) -> list[str]:
    columns = [*head, *COLUMNS, "gradients", "exceptions"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, cells in zip(rows, first, strict=True):
        lines.append("| " + " | ".join([*cells, *row.cells()]) + " |")
    return lines


def sums(rows: Iterable[Row]) -> list[Row]:
    """A row for each kind and mode, and one a mode for all."""
    found: dict[tuple[str, str], Row] = {}
    for kind_of in (lambda row: row.kind, lambda row: "all"):
        for row in rows:
            key = (kind_of(row), row.mode)
            total = found.setdefault(key, Row(key[0], "", "", row.mode))
            total.counts += row.counts
            total.errors += row.errors
            total.gradients += row.gradients
    return list(found.values())


def report(rows: list[Row], seeds: range, seconds: float) -> list[str]:
    """The report's lines; the last one has the total."""
    lines = ["# What eigsh calls converged, on hard problems", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].rsplit("\n\n", 1)[0].strip(), ""]
    lines += [f"The default mode is {DEFAULT!r}. Seeds {seeds.start} to {seeds.stop - 1}."]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}, {seconds:.0f} s.", ""]
    totals = sums(rows)
    lines += [*table(totals, ("kind", "mode"), [(t.kind, t.mode) for t in totals]), ""]
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        cells = [(row.name, row.dtype, row.mode) for row in some]
        lines += [f"## {kind.capitalize()}", ""]
        lines += [*table(some, ("family", "precision", "mode"), cells), ""]
    lines += ["## Wrong, one by one", ""]
    for row in rows:
        lines += [f"- {remark}" for remark in row.remarks[:SHOWN]]
        if len(row.remarks) > SHOWN:
            lines.append(f"- (and {len(row.remarks) - SHOWN} more of this row)")
    by_mode = {mode: sum(r.counts["wrong"] for r in rows if r.mode == mode) for mode in MODES}
    parts = ", ".join(f"{mode} {count}" for mode, count in by_mode.items())
    wrong = sum(row.counts["wrong"] for row in rows)
    values = sum(row.counts["values"] for row in rows)
    raised = sum(row.counts["raised"] for row in rows if row.mode.startswith(DEFAULT))
    last = f"Wrong: {wrong} of {values} values (lanczos: {parts}); {raised} default runs raised."
    return [*lines, "", last]


def seed_range(text: str) -> range:
    first, last = text.split(":")
    return range(int(first), int(last))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer values asked")
    add("--seeds", type=seed_range, default=range(1), metavar="A:B")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--families", nargs="+", metavar="TEXT", help="whose name or kind holds one of these")
    add("--processes", type=int, default=1)
    add("--check", action="store_true", help="only compare the truths with central differences")
    add("--out", type=Path, default=Path("bench/results/hard_truth"))
    arguments = parser.parse_args()
    wished = [text.lower() for text in arguments.families or [""]]
    numbers = [
        i
        for i, family in enumerate(FAMILIES)
        if any(text in f"{family.name} {family.kind}".lower() for text in wished)
    ]
    seeds, begun = arguments.seeds, time.perf_counter()
    rows: list[Row] = []
    bad = 0
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        if arguments.check:
            for lines in pool.map(partial(check, seeds=seeds), numbers):
                bad += sum(line.endswith("!") for line in lines)
                for line in lines:
                    print(line, flush=True)
            return int(bad > 0)
        work = partial(sweep, seeds=seeds, modes=arguments.modes, quick=arguments.quick)
        for found in pool.map(work, numbers):
            rows += found
            wrong = sum(row.counts["wrong"] for row in found)
            name = found[0].name if found else ""
            print(f"{time.perf_counter() - begun:5.0f} s  {name}: {wrong} wrong", flush=True)
    lines = report(rows, seeds, time.perf_counter() - begun)
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    raised = any(row.counts["raised"] for row in rows if row.mode.startswith(DEFAULT))
    return int(raised or any(row.counts["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
