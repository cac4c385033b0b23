"""Does lyapcuda pass the cases that curvlinops tests its Hessian on? Against dense Hessians.

    python bench/curvlinops_cases.py [--cases DIR] [--mode exact] [--out FILE]

DIR is a checkout of curvlinops whose cases are then read (it needs curvlinops and what its tests
import). Without it, the restatement in bench/curvlinops_restated.py is taken.

Version 3.0.1 has 16 cases of model, loss and reduction, each with the whole Hessian, with a block a
parameter and with two blocks: 48 configurations. Each is tried in float32 and in float64, in two
ways, 192 checks:

- product: H times the identity beside the dense Hessian, by double backward in float64, element by
  element. The tolerances are those of curvlinops: in float32 a relative 1e-4 and an absolute 1e-6
  (3.0.1), in float64 1e-5 and 1e-8 (its later tests);
- eigsh: the largest eigenvalue, converged and within its tolerance (1e-3 in float32, 1e-6 in
  float64) of the dense one's; of blocks, each block's.

The data are concatenated, as for the dense Hessian of curvlinops' own tests: data= is not tried. An
exception counts as a failure. The exit status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# This checkout's package, whatever else is installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lyapcuda  # noqa: E402
from curvlinops_restated import Case, restated_cases  # noqa: E402
from hard.problem import dense_hessian, eigenvalues  # noqa: E402
from ops import cpu_name  # noqa: E402

if not Path(lyapcuda.__file__).is_relative_to(ROOT):
    raise ImportError(f"lyapcuda comes from {lyapcuda.__file__}, not from {ROOT}")

#: Of a product (relative, absolute), and of eigsh.
TOLERANCES = {torch.float32: (1e-4, 1e-6, 1e-3), torch.float64: (1e-5, 1e-8, 1e-6)}
BLOCKS: dict[str, Callable[[list[Tensor]], list[list[Tensor]]]] = {
    "full": lambda params: [params],
    "a block a parameter": lambda params: [[p] for p in params],
    "two blocks": lambda params: [params[: len(params) // 2], params[len(params) // 2 :]],
}


class Given(nn.Module):
    """A function of parameters and inputs as a module."""

    def __init__(self, function: Any, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(params)
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in params.values())

    def forward(self, x: Any) -> Tensor:
        values = dict(zip(self.names, self.values, strict=True))
        if isinstance(self.function, nn.Module):
            return functional_call(self.function, values, (x,))
        return self.function(values, x)


class FromDictionary(nn.Module):
    """A model that takes a dictionary, of its one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model({"x": x})


def original_cases(folder: Path) -> list[Case]:
    """Those of a checkout of curvlinops, on the CPU."""
    sys.path.insert(0, str(folder))  # before Python's own "test"
    from test.cases import CASES
    from test.conftest import initialize_case

    cases = []
    for i, made in enumerate(case for case in CASES if case["device"].type == "cpu"):
        model, criterion, params, batches, _ = initialize_case(made)
        if isinstance(params, dict):  # as later versions have it
            model = Given(model, params)
        data = [(x if isinstance(x, Tensor) else x["x"], y) for x, y in batches]
        if not isinstance(next(iter(batches))[0], Tensor):
            model = FromDictionary(model)
        reduction = getattr(criterion, "reduction", "")
        cases.append(Case(f"{i} {type(criterion).__name__} {reduction}", model, criterion, data))
    return cases


def loss_of(case: Case, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The closure over all data; the model is changed to the type in place."""
    model = case.model.to(dtype)
    x = torch.cat([x for x, _ in case.data]).to(dtype)
    y = torch.cat([y for _, y in case.data])
    y = y.to(dtype) if y.is_floating_point() else y
    return lambda: case.criterion(model(x), y)


def product_error(operator: lyapcuda.HessianOperator, exact: Tensor) -> str:
    """What differs of H times the identity; nothing where all is within the tolerances."""
    rtol, atol, _ = TOLERANCES[operator.dtype]
    found = (operator @ torch.eye(len(exact), dtype=operator.dtype)).double()
    if torch.allclose(found, exact, rtol=rtol, atol=atol):
        return ""
    return f"|H − exact|/|exact| = {float((found - exact).norm() / exact.norm()):.1e}"


def eigsh_error(operator: lyapcuda.HessianOperator, exact: Tensor) -> str:
    """What is wrong with the largest eigenvalue."""
    tol = TOLERANCES[operator.dtype][2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)
        result = lyapcuda.eigsh(operator, tol=tol)
    values = eigenvalues(exact)
    value, top, norm = float(result.eigenvalues[0]), float(values[-1]), float(values.abs().max())
    # What is zero may be off by so much of ‖H‖.
    slack = max(tol * abs(top), tol * norm / 30 if abs(top) <= tol * norm / 30 else 0.0)
    right = abs(value - top) <= slack
    if right and bool(result.converged[0]):
        return ""
    return f"{value:.7g} for {top:.7g}" + ("" if bool(result.converged[0]) else ", not converged")


CHECKS = {"product": product_error, "eigsh": eigsh_error}


def attempt(
    check: Callable[[lyapcuda.HessianOperator, Tensor], str],
    closure: Callable[[], Tensor],
    block: list[Tensor],
    exact: Tensor,
    options: dict[str, Any],
) -> str:
    """What a check found, or the exception it ended with."""
    try:
        return check(lyapcuda.HessianOperator(closure, block, **options), exact)
    except Exception as error:  # whatever it is belongs into the report
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def run(cases: list[Case], options: dict[str, Any]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """How many checks of (precision, way) passed; and a line for each failure."""
    passed: Counter[tuple[str, str]] = Counter()
    failures = []
    for case in cases:
        closure = loss_of(case, torch.float64)
        params = list(case.model.parameters())
        sizes = [p.numel() for p in params]
        whole = dense_hessian(closure, params)
        for dtype in TOLERANCES:
            short = str(dtype).removeprefix("torch.")
            closure = loss_of(case, dtype)
            params = list(case.model.parameters())
            for blocks, split in BLOCKS.items():
                for way, check in CHECKS.items():
                    found, start = [], 0
                    for block in split(params):
                        end = start + sum(p.numel() for p in block)
                        exact = whole[start:end, start:end]
                        found.append(attempt(check, closure, block, exact, options))
                        start = end
                    assert start == sum(sizes)
                    wrong = "; ".join(text for text in found if text)
                    passed[short, way] += not wrong
                    if wrong:
                        failures.append(f"{case.name}, {blocks}, {short}, {way}: {wrong}")
    return passed, failures


def report(passed: Counter[tuple[str, str]], failures: list[str], count: int, how: str) -> str:
    """As Markdown; the last line has the total."""
    lines = ["# curvlinops' cases", "", (__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    lines += [f"{how} Machine: {cpu_name()}, torch {torch.__version__}.", ""]
    lines += ["| precision | way | passed | of |", "|---|---|---|---|"]
    for (short, way), number in passed.items():
        lines.append(f"| {short} | {way} | {number} | {count} |")
    lines += ["", "## Failures", "", *[f"- {line}" for line in failures or ["none"]], ""]
    total = count * len(passed)
    return "\n".join([*lines, f"Passed: {sum(passed.values())} of {total}."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--cases", type=Path, metavar="DIR", help="a checkout of curvlinops")
    add("--mode", help="of HessianOperator; default: its own choice")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "curvlinops_cases.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = arguments.cases is not None
    cases = original_cases(arguments.cases) if original else restated_cases()
    options = {} if arguments.mode is None else {"mode": arguments.mode}
    passed, failures = run(cases, options)
    how = f"Cases: {'the original' if original else 'restated'}; mode: "
    how += f"{arguments.mode or 'the default'}."
    text = report(passed, failures, len(cases) * len(BLOCKS), how)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
