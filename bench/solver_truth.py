"""Is what eigsh calls converged true? Seeded small smooth nets against dense Hessians.

    python bench/solver_truth.py [--seeds 0:5] [--climbs 0:1] [--methods lanczos]
        [--out bench/results/solver_truth]

The nets of tests/support/nets.py (linear, two MLPs, convolution, attention), cross-entropy and
squared error in turn; k from 1 to 14 at every end; float32 with tol 1e-3 (by default, which takes
exact products; by differences; by central ones alone) and float64 with tol 1e-6. The truth is the
dense Hessian in float64 at the same parameters. Counted are, of all values returned,

- wrong: called converged, and further from the exact i-th wanted value than tol (relative; a value
  that is zero within the differences' error may be off by three of those);
- another: of these the ones off by more than three tolerances;
- empty: intervals that hold no exact eigenvalue, converged or not;
- open: values not called converged;

and the median of the gradient evaluations a run; "skew" is the largest |UUᵀ − 1| of the returned
eigenvectors. method="lyapunov" runs on the --climbs seeds only, k of 1, 3 and 8: it takes some ten
times the gradients. A float32 run by differences counts those of both kinds where forward ones
turned out too coarse; one by exact products counts each as two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lyapcuda
from ops import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from nets import SOLVED, case  # noqa: E402
from truths import is_off, wanted  # noqa: E402

KINDS = {
    "float32": (torch.float32, dict(tol=1e-3)),
    "float32, differences": (torch.float32, dict(tol=1e-3, mode="difference")),
    "float32, central": (torch.float32, dict(tol=1e-3, mode="difference", difference="central")),
    "float64": (torch.float64, dict(tol=1e-6)),
    "float64, differences": (torch.float64, dict(tol=1e-6, mode="difference")),
}
WHICH = ("LA", "SA", "LM", "BE")
COUNTS = {"lanczos": (1, 2, 3, 5, 8, 14), "lyapunov": (1, 3, 8)}


@dataclass
class Tally:
    values: int = 0
    wrong: int = 0
    another: int = 0
    empty: int = 0
    open: int = 0
    skew: float = 0.0
    gradients: list[int] = field(default_factory=list)

    def row(self) -> list[str]:
        counts = (self.values, self.wrong, self.another, self.empty, self.open)
        median = f"{statistics.median(self.gradients):.0f}"
        return [*map(str, counts), f"{self.skew:.0e}", median]


def judge(result: lyapcuda.EigenResult, exact: torch.Tensor, tally: Tally, label: str) -> list[str]:
    """Adds a run to the tally; a line for everything that is wrong."""
    right = wanted(exact, len(result.eigenvalues), result.which)
    tally.gradients.append(result.gradient_evaluations)
    u = result.eigenvectors.double()
    skew = (u @ u.T - torch.eye(len(u), dtype=torch.float64)).abs().max()
    tally.skew = max(tally.skew, float(skew))
    wrong = []
    for i in range(len(right)):
        low, high = result.interval[i].tolist()
        tally.values += 1
        empty = not bool(((exact >= low) & (exact <= high)).any())
        tally.empty += empty
        converged = bool(result.converged[i])
        tally.open += not converged
        off = converged and is_off(result, i, exact)
        tally.wrong += off
        tally.another += off and is_off(result, i, exact, times=3.0)
        if off or empty:
            found, r = float(result.eigenvalues[i]), float(result.residuals[i])
            wrong.append(
                f"{label}, value {i}: {found:.7g} for {float(right[i]):.7g}, residual {r:.1e}, "
                f"difference error {float(result.difference_errors[i]):.1e}"
                + (", interval empty" if empty else "")
                + ("" if converged else ", not converged")
            )
    return wrong


def seeds(text: str) -> range:
    first, last = text.split(":")
    return range(int(first), int(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=seeds, default=range(5), metavar="A:B")
    parser.add_argument("--climbs", type=seeds, default=range(1), metavar="A:B")
    parser.add_argument("--methods", nargs="+", default=list(COUNTS), choices=list(COUNTS))
    parser.add_argument("--nets", nargs="+", default=list(SOLVED), choices=list(SOLVED))
    parser.add_argument("--out", type=Path, default=Path("bench/results/solver_truth"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
    tallies: dict[tuple[str, str], Tally] = {}
    wrong: list[str] = []
    begun = time.perf_counter()
    for seed in sorted({*arguments.seeds, *arguments.climbs}):
        for name in arguments.nets:
            for kind, (dtype, options) in KINDS.items():
                truth = case(name, seed, dtype, kind=("ce", "mse")[seed % 2])
                n = len(truth.eigenvalues)
                for method in arguments.methods:
                    if seed not in (arguments.climbs if method == "lyapunov" else arguments.seeds):
                        continue
                    tally = tallies.setdefault((method, kind), Tally())
                    for which in WHICH:
                        for k in COUNTS[method]:
                            result = lyapcuda.eigsh(
                                truth.closure,
                                truth.model.parameters(),
                                min(k, n),
                                which,
                                method=method,
                                seed=seed,
                                **options,
                            )
                            label = f"{name} {seed}, {kind}, {method}, {which}, k={k}"
                            wrong += judge(result, truth.eigenvalues, tally, label)
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s, {len(wrong)} wrong", flush=True)
    lines = ["# What eigsh calls converged, against dense Hessians", ""]
    lines += [__doc__.split("\n\n", 2)[2].strip(), ""]
    climbs = arguments.methods == ["lyapunov"]
    spans = [arguments.climbs] if climbs else [arguments.seeds, arguments.climbs]
    span = ", ".join(f"{r.start} to {r.stop - 1}" for r in spans if r)
    lines += [f"Seeds {span}; nets {', '.join(arguments.nets)}.", ""]
    lines += [f"Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    lines += ["| method | precision | values | wrong | another | empty | open | skew | gradients |"]
    lines += ["|---" * 9 + "|"]
    for (method, kind), tally in tallies.items():
        lines.append("| " + " | ".join([method, kind, *tally.row()]) + " |")
    lines += ["", "## Wrong or empty, one by one", "", *[f"- {line}" for line in wrong or ["none"]]]
    arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
