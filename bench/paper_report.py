"""Puts the paper's figures, as run, into bench/results/paper: pictures, numbers, a report.

    python -m examples.paper figures all --quick --data DIR --threads 1 --out runs/paper
    python bench/paper_report.py runs/paper [--out bench/results/paper]

The runs' CSVs and checkpoints stay where they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ops import cpu_name


def number(value: Any, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def run_row(panel: dict[str, Any]) -> list[str]:
    accuracy = panel["accuracy"]
    exact = panel["exact"]
    extra = []
    if panel.get("correlation") is not None:
        extra.append(
            f"r = {number(panel['correlation'], 2)}, slope {number(panel['slope'], 2)}; α·h0 as "
            f"printed {number(panel['alpha_h_at_high_alpha'])} where α is high, "
            f"{number(panel['alpha_h_at_low_alpha'])} where low"
        )
    if panel["config"]["schedule"] == "qn":
        extra.append(
            f"α {number(panel['lr_first'])} → {number(panel['lr_last'])}, "
            f"rises {panel['loss_rises']} of 9"
        )
    return [
        panel["title"] + ("" if panel["finished"] else " (unfinished)"),
        f"{panel['steps']} × {panel['config']['batch_size']}",
        f"{number(panel['loss_first'])} → "
        + ("diverged" if panel["diverged"] else number(panel["loss_last"])),
        "" if accuracy is None else f"{accuracy:.1%}",
        number(panel.get("alpha_h_printed")),
        number(panel["alpha_h"]),
        number(panel.get("factor")),
        number(exact and panel["alpha_exact"]),
        number(panel.get("printed_over_exact")),
        number(panel.get("unbiased_over_exact")),
        "; ".join(extra),
    ]


HEADINGS = (
    "run",
    "steps × batch",
    "loss",
    "test accuracy",
    "α·h0 as printed",
    "α·h0 unbiased",
    "factor",
    "α·h0 exact, at the end",
    "printed / exact",
    "unbiased / exact",
    "",
)


def table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def spectrum(panel: dict[str, Any]) -> list[str]:
    first, last = panel["unbiased"][0], panel["unbiased"][-1]
    lines = [
        f"- {panel['title']} ({panel['steps']} steps of {panel['config']['batch_size']}): from "
        f"{number(first)} to {number(last)}, a ratio of {number(panel['shallowness'])}; as "
        f"printed {number(panel['printed'][0])} to {number(panel['printed'][-1])}."
    ]
    if panel["exact"] is not None:
        exact = panel["exact"]
        lines.append(
            f"  Lanczos after the epoch, on one minibatch: {number(exact[0])} to "
            f"{number(exact[-1])}; the last tracked ones over these: "
            f"{number(panel['unbiased_over_exact'][0])} to "
            f"{number(panel['unbiased_over_exact'][-1])}."
        )
    if "exponents" in panel:
        lines.append(
            f"  Exponents of SGD: {number(panel['exponents'][0])} to "
            f"{number(panel['exponents'][-1])} a step, the shortest timescale "
            f"{number(panel['timescale'])} steps."
        )
    return lines


def section(report: dict[str, Any]) -> list[str]:
    lines = [f"## Figure {report['figure']}: {report['shows']}", ""]
    lines += [f"The paper: {report['claim']}.", ""]
    lines += [f"![Figure {report['figure']}](fig{report['figure']}.png)", ""]
    runs = [panel for panel in report["panels"] if "alpha_h" in panel]
    if runs:
        lines += table([run_row(panel) for panel in runs])
    for panel in report["panels"]:
        if "unbiased" in panel:
            lines += spectrum(panel)
    missing = [panel["title"] for panel in report["panels"] if not panel["run"]]
    if missing:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    failed = [
        f"- {panel['title']}: {check['claim']}"
        for panel in report["panels"]
        for check in panel["checks"]
        if not check["holds"]
    ]
    checks = sum(len(panel["checks"]) for panel in report["panels"])
    lines += ["", f"{checks - len(failed)} of {checks} checks hold."]
    if failed:
        lines += ["These don't:", "", *failed]
    lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="RUNS")
    parser.add_argument("--out", type=Path, default=Path("bench/results/paper"))
    arguments = parser.parse_args()
    reports = [
        json.loads(path.read_text())
        for path in sorted(arguments.folder.glob("fig*.json"), key=lambda p: int(p.stem[3:]))
    ]
    if not reports:
        parser.error(f"{arguments.folder}: no fig*.json")
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# The paper's figures",
        "",
        f"Machine: {cpu_name()}, one thread, torch {reports[0]['torch']}; data: "
        f"{reports[0]['data']}. α·h0 and the factor are medians over the last half of a run's "
        "steps. Exact: Lanczos on exact Hessian-vector products over the minibatches after the "
        "last step.",
        "",
    ]
    for report in reports:
        lines += section(report)
        for suffix in (".png", ".json"):
            name = f"fig{report['figure']}{suffix}"
            shutil.copy(arguments.folder / name, arguments.out / name)
    (arguments.out / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
