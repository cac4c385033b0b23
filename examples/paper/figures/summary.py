"""The paper's claims by numbers, from a run's CSV."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .table import Panel, Spectrum

#: What "follows" is taken to mean: α·h0 within this factor of 1, as the median of the last half.
FOLLOWS = 1.25
#: ... and under a cyclic rate: the correlation of log 1/h0 with log α.
CORRELATES = 0.8
_PARTS = 10


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def _significant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _significant(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_significant(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _check(claim: str, holds: bool) -> dict[str, Any]:
    return {"claim": claim, "holds": bool(holds)}


def of_run(panel: Panel, columns: dict[str, np.ndarray], done: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a training run, and the checks of what the paper says of it.

    Args:
        panel: the panel.
        columns: of its CSV, from :func:`examples.paper.plots.read_columns`.
        done: what the run left: ``diverged``, ``accuracy``, ``exact`` (h0 or None).

    Returns:
        Plain values. ``alpha_h_printed`` and ``alpha_h`` are medians of α·h0 over the last half of
        the steps, by Algorithm 1 as printed and unbiased; ``factor`` that of their ratio. Of a run
        that diverged they are NaN: it overflows.
    """
    alpha, loss, exponent = (columns[name] for name in ("lr", "loss", "exponent"))
    steps = len(loss)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = 1.0 / columns["inverse_h"]
    middle = (columns["h_low"] + columns["h_high"]) / 2.0
    half = slice(steps // 2, None)
    tail = slice(-max(1, steps // _PARTS), None)
    numbers: dict[str, Any] = {
        "steps": steps,
        "epochs": float(columns["epoch"][-1]) if steps else 0.0,
        "diverged": done["diverged"],
        "loss_first": float(loss[0]) if steps else math.nan,
        "loss_last": float(np.mean(loss[tail])) if steps else math.nan,
        "accuracy": done["accuracy"],
        "exponent": _median(exponent[half]),
        "exponent_spread": float(np.std(exponent[half])) if steps else math.nan,
        "h_last": _median(h[tail]),
        "exact": done["exact"],
    }
    if panel.faithful:
        numbers |= {
            "alpha_h_printed": _median(alpha[half] * h[half]),
            "alpha_h": _median(alpha[half] * middle[half]),
            "factor": _median(middle[half] / h[half]),
        }
        unbiased = _median(middle[tail])
    else:
        numbers["alpha_h"] = _median(alpha[half] * h[half])
        unbiased = numbers["h_last"]
    if done["exact"] is not None:
        numbers["unbiased_over_exact"] = unbiased / done["exact"]
        numbers["alpha_exact"] = float(alpha[-1]) * done["exact"]
        if panel.faithful:
            numbers["printed_over_exact"] = numbers["h_last"] / done["exact"]
    if done["diverged"]:
        measured = ("exponent", "exponent_spread", "h_last", "alpha_h_printed", "alpha_h", "factor")
        numbers |= {name: math.nan for name in measured if name in numbers}
    trained = not done["diverged"] and numbers["loss_last"] < numbers["loss_first"]
    checks = [_check("trains" if panel.trains else "does not train", trained == panel.trains)]
    if panel.trains and panel.faithful and panel.schedule == "constant":
        product = numbers["alpha_h_printed"]
        close = product > 0 and abs(math.log(product)) <= math.log(FOLLOWS)
        checks.append(_check(f"1/h0 (as printed) within a factor {FOLLOWS} of α", close))
    if panel.trains and panel.schedule == "cyclic":
        numbers |= _cyclic(alpha, h)
        checks.append(
            _check(
                f"log 1/h0 correlates with log α by {CORRELATES} or more",
                numbers["correlation"] >= CORRELATES,
            )
        )
    if panel.schedule == "qn":
        parts = [float(np.mean(part)) for part in np.array_split(loss, min(_PARTS, steps))]
        numbers["lr_first"] = float(alpha[0]) if steps else math.nan
        numbers["lr_last"] = _median(alpha[tail])
        numbers["loss_rises"] = sum(b > a for a, b in zip(parts, parts[1:], strict=False))
        checks += [
            _check("α decreases", numbers["lr_last"] < numbers["lr_first"]),
            _check(f"the loss falls from each tenth to the next ({_PARTS})", _falls(numbers)),
        ]
    return _significant(numbers) | {"checks": checks}


def _falls(numbers: dict[str, Any]) -> bool:
    return not numbers["diverged"] and numbers["loss_rises"] == 0


def _cyclic(alpha: np.ndarray, h: np.ndarray) -> dict[str, float]:
    """How log 1/h goes with log α after the first quarter, and α·h in α's upper and lower third."""
    late = np.arange(len(alpha)) >= len(alpha) // 4
    use = late & np.isfinite(h) & (h > 0)
    x, y = np.log(alpha[use]), -np.log(h[use])
    missing = dict.fromkeys(
        ("correlation", "slope", "alpha_h_at_high_alpha", "alpha_h_at_low_alpha"), math.nan
    )
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return missing
    low, high = np.quantile(x, [1 / 3, 2 / 3])
    return {
        "correlation": float(np.corrcoef(x, y)[0, 1]),
        "slope": float(np.polyfit(x, y, 1)[0]),
        "alpha_h_at_high_alpha": float(np.median(np.exp(x - y)[x >= high])),
        "alpha_h_at_low_alpha": float(np.median(np.exp(x - y)[x <= low])),
    }


def of_spectrum(panel: Spectrum, done: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a spectrum over the first epoch.

    Args:
        panel: the panel.
        done: ``printed`` and ``unbiased``, each steps × k, and ``exact`` (k values or None).

    Returns:
        Plain values; ``shallowness`` is the last value over the first. For the most negative:
        ``exponents`` −α·h of SGD (App. A), and the shortest timescale in steps.
    """
    unbiased = np.array(done["unbiased"])
    mean = unbiased.mean(0)
    numbers: dict[str, Any] = {
        "steps": len(unbiased),
        "unbiased": mean.tolist(),
        "unbiased_spread": unbiased.std(0).tolist(),
        "printed": np.array(done["printed"]).mean(0).tolist(),
        "shallowness": float(mean[-1] / mean[0]),
        "exact": done["exact"],
    }
    if done["exact"] is not None:
        ratio = unbiased[-1] / np.array(done["exact"])
        numbers["unbiased_over_exact"] = ratio.tolist()
    checks = []
    if panel.which == "SA":
        exponents = -panel.lr * mean
        numbers["exponents"] = exponents.tolist()
        numbers["timescale"] = float(1.0 / exponents.max()) if exponents.max() > 0 else math.nan
        checks = [
            _check("several directions of SGD are unstable", int((exponents > 0).sum()) > 1),
            _check("the shortest timescale is tens of steps", 10 <= numbers["timescale"] < 100),
        ]
    return _significant(numbers) | {"checks": checks}
