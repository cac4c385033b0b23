"""How large the separation should be: the error of h on smooth nets as a function of Δq.

    python bench/perturbation.py [--out bench/results/perturbation]

Four nets (tests/support/nets.py), two seeds, both ends of the spectrum, frozen θ and data; the
truth is the dense Hessian in float64. Δq is c·ε^(1/3)·max(‖θ‖, √N/100), ε of the parameters' dtype.
Reported per c: the median and the largest relative error of h (the mean over both sides of θ), of
the one-sided Rayleigh quotient, and how many intervals hold an exact eigenvalue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from pathlib import Path

import torch

import lyapcuda
from lyapcuda.dynamics.perturbation import default_perturbation
from lyapcuda.params.flat import FlatLayout

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from nets import NAMES, case  # noqa: E402

FACTORS = (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0)
DEFAULT = 0.25


def errors(dtype: torch.dtype, factor: float) -> tuple[list[float], list[float], int]:
    """Relative errors of h and of one-sided ρ where the tracker had converged; intervals missed."""
    both, one, missed = [], [], 0
    for name in NAMES:
        for seed in (1, 2):
            truth = case(name, seed, dtype)
            size = default_perturbation(FlatLayout(truth.model.parameters())) / DEFAULT * factor
            for which, exact in (("LA", truth.h0), ("SA", truth.hN)):
                # Convex: hN is 0. tanh_mlp's two lowest lie within 10 %: not converged in 700.
                if which == "SA" and name in ("linear", "tanh_mlp"):
                    continue
                tracker = lyapcuda.CurvatureTracker(
                    truth.model.parameters(), which=which, perturbation=size
                )
                for _ in range(200 if which == "LA" else 700):
                    tracker.step(truth.closure)
                both.append(abs(float(tracker.h) / exact - 1))
                one.append(abs(float(tracker.rayleigh) / exact - 1))
                low, high = tracker.interval.tolist()
                missed += not bool(((truth.eigenvalues >= low) & (truth.eigenvalues <= high)).any())
    return both, one, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/perturbation"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the small ones warn, as they should
    lines = ["# Error of h as a function of Δq", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    for dtype in (torch.float32, torch.float64):
        lines += [f"## {dtype}", ""]
        lines += ["| c | h: median | h: largest | one side: median | one side: largest | missed |"]
        lines += ["|---|---|---|---|---|---|"]
        for factor in FACTORS:
            both, one, missed = errors(dtype, factor)
            numbers = [statistics.median(both), max(both), statistics.median(one), max(one)]
            cells = [f"{number:.1e}" for number in numbers]
            label = f"{factor:g}" + (" (default)" if factor == DEFAULT else "")
            lines.append(f"| {label} | " + " | ".join(cells) + f" | {missed} of {len(both)} |")
            print(lines[-1], flush=True)
        lines.append("")
    arguments.out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
