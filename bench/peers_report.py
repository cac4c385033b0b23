"""The report of bench/peers.py as Markdown."""

from __future__ import annotations

from typing import Any

from peers_tools import TOOLS

#: Gradient-times on the MLP that were aimed for.
GOALS = {1: 8.0, 5: 27.0}
FASTER = 3.0


def markdown(report: dict[str, Any], method: str) -> str:
    """A table a problem, and what becomes of the goals."""
    lines = []
    if method:
        lines += ["# Beside other tools", "", *method.strip().split("\n\n", 3)[3].splitlines(), ""]
        versions = dict.fromkeys(v for v in report["versions"].values() if v)
        lines += [
            f"Machine: {report['machine']}, {report['threads']} threads, load {report['load']:.1f} "
            f"at the start. {'; '.join(versions) or 'No peer is installed.'}",
            "",
        ]
    for problem in report["problems"]:
        lines += _problem(problem, report)
    if method:
        lines += ["Made by `bench/peers.py`."]
    return "\n".join(lines) + "\n"


def _problem(problem: dict[str, Any], report: dict[str, Any]) -> list[str]:
    spec = problem["spec"]
    lines = [f"## {spec['title']}", ""]
    if "failed" in problem:
        return [*lines, f"Not measured: {problem['failed']}", ""]
    about, truth, plain = problem["about"], problem["reference"], problem["gradient"]
    seconds = min(plain["seconds"]) if plain["seconds"] else None
    values = ", ".join(f"{v:.6g}" for v in truth["values"])
    worst = max(r / abs(v) for r, v in zip(truth["residuals"], truth["values"], strict=True))
    lines += [
        f"{about['data']}; input {'×'.join(map(str, about['input']))}, "
        f"{about['parameters']:,} parameters ({_megabytes(4 * about['parameters'])} a vector), "
        f"loss {about['loss']:.3g} after {spec['steps']} steps. "
        f"Reference: {values} (residuals at most {worst:.0e} of them). One gradient: "
        f"{_milliseconds(seconds)}, peak {_megabytes(plain['peak'])}.",
        "",
    ]
    if not spec["smooth"]:
        lines += [
            "ReLU: differences of gradients see a curvature of its kinks that exact products "
            "don't, so they don't converge to this reference; they are measured at one usual "
            "setting, marked *.",
            "",
        ]
    ks = [k for k in spec["ks"] if k in report["k"]]
    for k in ks:
        lines += _table(problem, k, seconds)
    return [*lines, *_goals(problem, ks, seconds, report["target"]), ""]


def _table(problem: dict[str, Any], k: int, gradient: float | None) -> list[str]:
    lines = [
        f"| top {k} | time | gradient-times | passes | memory | error | setting |",
        "|---|---|---|---|---|---|---|",
    ]
    for tool, by_k in problem["tools"].items():
        found = by_k[str(k)]
        lines.append(f"| {TOOLS[tool].title} | " + " | ".join(_cells(found, gradient)) + " |")
    return [*lines, ""]


def _cells(found: dict[str, Any], gradient: float | None) -> list[str]:
    status = found["status"]
    if status == "failed":
        return [f"fails: {found['message'].replace('|', '/')}", *[""] * 5]
    if status == "not installed" or found["setting"] is None:
        return [status, *[""] * 5]
    time = found["time"]
    cells = [
        f"{status}, at best:" if time is None else _milliseconds(time),
        f"{time / gradient:.1f}" if time and gradient else "",
        f"{found['forward']:.3g} + {found['backward']:.3g}",
        _megabytes(found["peak"]),
        f"{found['error']:.1e}" + ("*" if status == "kinks" else ""),
        found["description"],
    ]
    return cells


def _goals(
    problem: dict[str, Any], ks: list[int], gradient: float | None, target: float
) -> list[str]:
    """What was aimed for, and whether it was met."""
    lines = []
    for k in ks:
        found = {tool: by_k[str(k)] for tool, by_k in problem["tools"].items()}
        done = {t: o for t, o in found.items() if o["time"] is not None and o["error"] <= target}
        ours = {t: o for t, o in done.items() if TOOLS[t].ours}
        peers = {t: o for t, o in done.items() if not TOOLS[t].ours}
        if not ours or gradient is None:
            lines.append(f"- Top {k}: lyapcuda has not reached the accuracy.")
            continue
        best = min(ours, key=lambda t: ours[t]["time"])
        times = ours[best]["time"] / gradient
        text = f"- Top {k}: {_plain(best)} takes {times:.1f} gradient-times"
        if problem["name"].startswith("mlp") and k in GOALS:
            text += f" (aim {GOALS[k]:g}: {_met(times <= GOALS[k])})"
        if peers:
            rival = min(peers, key=lambda t: peers[t]["time"])
            ratio = peers[rival]["time"] / ours[best]["time"]
            text += (
                f"; the fastest peer, {_plain(rival)}, takes {ratio:.1f} times as long (aim "
                f"{FASTER:g}: {_met(ratio >= FASTER)})"
            )
            least = min(ours.values(), key=lambda o: o["peak"] or 0)["peak"]
            lean = min((p for p in peers if peers[p]["peak"]), key=lambda t: peers[t]["peak"])
            if least is not None:
                text += (
                    f"; least memory {_megabytes(least)} beside {_megabytes(peers[lean]['peak'])} "
                    f"of {_plain(lean)} (aim less: {_met(least < peers[lean]['peak'])})"
                )
        else:
            text += "; no peer has reached the accuracy"
        lines.append(text + ".")
    return lines


def _plain(tool: str) -> str:
    return TOOLS[tool].title.replace("**", "")


def _met(met: bool) -> str:
    return "met" if met else "not met"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _megabytes(size: float | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f} MB"
