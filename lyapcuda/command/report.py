"""Eigenvalues of a problem's Hessian as a table, JSON and a picture."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lyapcuda
from lyapcuda import EigenResult, SpectralDensity, TraceResult
from lyapcuda.command.problem import Problem
from lyapcuda.files import finite, replace_file, write_json
from lyapcuda.plots.figure import new_figure
from lyapcuda.solvers.density import check_steps
from lyapcuda.solvers.trace import check_samples
from lyapcuda.tables import aligned

__all__ = ["EigsReport", "measure"]

JSON, PNG = "eigs.json", "eigs.png"


@dataclass(frozen=True)
class EigsReport:
    """What was measured; `trace` and `density` where they were asked for."""

    problem: Problem
    which: str
    result: EigenResult
    trace: TraceResult | None
    density: SpectralDensity | None

    @property
    def gradient_evaluations(self) -> int:
        """All in all, passes over the data counted as one each."""
        parts = (self.result, self.trace, self.density)
        return sum(part.gradient_evaluations for part in parts if part is not None)

    def table(self) -> str:
        """Eigenvalues with their error bars, for people."""
        rows = aligned(self.result.table(), ">><")
        if self.trace is not None:
            rows.append(f"trace {self.trace.trace:.6g} ± {self.trace.standard_error:.2g}")
        rows.append(f"{self.gradient_evaluations} gradient evaluations")
        how = f", {self.result.difference}" if self.result.mode == "difference" else ""
        rows.append(f"{self.result.mode}{how}: {self.result.reason}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        found: dict[str, Any] = {
            **self.problem.names,
            "which": self.which,
            "method": self.result.method,
            "mode": self.result.mode,
            "reason": self.result.reason,
            "doubts": list(self.result.doubts),
            "parameters": self.result.eigenvectors.shape[1],
            "eigenvalues": self.result.eigenvalues.tolist(),
            "residuals": self.result.residuals.tolist(),
            "interval": self.result.interval.tolist(),
            "converged": self.result.converged.tolist(),
            "iterations": self.result.iterations,
            "gradient_evaluations": self.gradient_evaluations,
            "lyapcuda": lyapcuda.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        if self.trace is not None:
            found["trace"] = self.trace.trace
            found["trace_standard_error"] = self.trace.standard_error
        if self.density is not None:
            found["density"] = {
                name: getattr(self.density, name).tolist()
                for name in ("grid", "density", "standard_error")
            }
        return finite(found)

    def write(self, out: Path) -> tuple[Path, Path]:
        """Writes eigs.json and eigs.png to a folder; returns their paths."""
        figure = self._figure()
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / JSON, self.to_dict())
        replace_file(out / PNG, lambda file: figure.savefig(file, format="png"))
        return out / JSON, out / PNG

    def _figure(self) -> Any:
        panels = 1 if self.density is None else 2
        figure = new_figure(height=4.0 * panels, layout="constrained")
        axes = self.result.plot(ax=figure.add_subplot(panels, 1, 1))
        axes.set_title(self.problem.names["model"])
        if self.density is not None:
            self.density.plot(ax=figure.add_subplot(panels, 1, 2))
        return figure


def measure(
    problem: Problem,
    *,
    k: int,
    which: str,
    tol: float,
    mode: str,
    method: str,
    maxiter: int | None,
    select: list[str] | None,
    exclude: list[str] | None,
    seed: int,
    progress: bool,
    trace_samples: int | None = None,
    density_steps: int | None = None,
) -> EigsReport:
    """Eigenvalues, and the trace and the density where asked for, of a problem's Hessian."""
    if trace_samples is not None:  # before the long part
        check_samples(trace_samples)
    if density_steps is not None:
        check_steps(density_steps)
    params = [
        {
            "params": list(problem.model.named_parameters()),
            "weight_decay": problem.weight_decay,
        }
    ]
    hessian = lyapcuda.HessianOperator(
        problem.closure,
        params,
        data=problem.batches,
        sizes=problem.sizes,
        mode=mode,
        select=select,
        exclude=exclude,
        model=problem.model,
    )
    result = lyapcuda.eigsh(
        hessian,
        k=k,
        which=which,
        tol=tol,
        method=method,
        maxiter=maxiter,
        seed=seed,
        progress=progress,
    )
    trace = density = None
    if trace_samples is not None:
        trace = lyapcuda.trace(hessian, samples=trace_samples, seed=seed)
    if density_steps is not None:
        density = lyapcuda.spectral_density(hessian, steps=density_steps, seed=seed)
    return EigsReport(problem, which, result, trace, density)
