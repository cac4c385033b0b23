"""How near the tracked h0 is to Lanczos at the edge of stability, on the public code's nets.

    python bench/tracking/edge.py DIR [--runs RUN ...] [--modes MODE ...] [--draw MODE ...]

The nets, losses, data and seed of github.com/locuslab/edge-of-stability: fc-tanh, fc-relu and
cnn-tanh, cross-entropy ("ce") and half the squared error summed over the classes ("mse"), the first
images of CIFAR-10, less every pixel's mean over all 50,000 and divided by its standard deviation;
gradient descent on the full batch, seed 0. The fully connected nets see 1,000 images (the code's
"cifar10-1k"), cnn-tanh 300 or 200, which a CPU can bear. The rates η are such that the exact value
starts below 2/η, grows to it and stays about there for a good part of a short run.

Every run is trained once without a tracker, and once for each mode with `tracker.backward(closure)`
in its place; the parameters after it must be bitwise the same, so all modes are compared on one
trajectory. Exact values are the largest eigenvalue of the Hessian at every fourth step (scipy's
eigsh on products by double backward, as in that code, to 1e-3; of ReLU nets the pointwise Hessian).
An earlier CSV's are taken as long as its losses are those of this run to the last digit.

Reported are the median and the 90th percentile of |tracked/exact − 1| for h, ρ (the last Rayleigh
quotient), the Schwarz quotient and the secant ‖y‖/‖q‖ with the sign of ρ; the gradients a step
beside those at θ, on average and at most; and, where the tracker has `h_error`, the share of steps
with |h − exact| ≤ h_error. Parts of a run: its first ten steps, in which q is random at first; then
before the edge, as long as the exact value is below 0.95·2/η; at the edge, from the first exact
value of at least 2/η on; and of that the unsteady part, from the first rise of the loss on: until
then θ hasn't yet left its smooth path and the value passes 2/η undisturbed. A mode is "default", or
the tracker's options, as in ``tol=0.1,iterations=2``.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import lyapcuda
from lyapcuda.files import LineFile
from lyapcuda.log import csv_line

BENCH, ROOT = Path(__file__).parents[1:3]
sys.path[:0] = [str(BENCH), str(ROOT)]

from examples.paper.cifar import CLASSES, PIXELS, read_folder  # noqa: E402
from tracking.readings import DEFAULT, modes_of  # noqa: E402
from tracking_cost import RESULTS, report  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "edge_of_stability.png"
EVERY = 4  # steps from one exact value to the next
FIRST = 10  # steps for a random q to find its direction
BELOW = 0.95  # of 2/η: "before the edge"

#: What is compared: label → the column.
VALUES = {"h": "h", "ρ": "rayleigh", "Schwarz": "schwarz", "secant": "secant"}
PARTS = {
    "first": f"first {FIRST} steps",
    "before": "before the edge",
    "at": "at the edge",
    "unsteady": "of these, unsteady",
}

Closure = Callable[[], Tensor]
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Run:
    """A net, a loss, a rate and how long it is trained, on how many images."""

    net: str
    loss: str
    rate: float
    steps: int
    images: int = 1000

    @property
    def name(self) -> str:
        return f"{self.net}_{self.loss}"

    @property
    def edge(self) -> float:
        return 2 / self.rate

    @property
    def path(self) -> Path:
        return RESULTS / f"tracking_edge_{self.name}.csv"


RUNS = {
    run.name: run
    for run in (
        Run("fc-tanh", "ce", 0.05, 280),
        Run("fc-tanh", "mse", 0.025, 420),
        Run("fc-relu", "ce", 0.07, 220),
        Run("fc-relu", "mse", 0.08, 220),
        Run("cnn-tanh", "ce", 0.1, 100, images=300),
        Run("cnn-tanh", "mse", 0.04, 184, images=200),
    )
}


# --- the public code's nets, data and losses ------------------------------------------------------


def network(name: str) -> nn.Sequential:
    """Two hidden layers of 200, or two of 32 channels with max pooling and a linear one."""
    kind, activation = name.split("-")
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    if kind == "fc":
        hidden = [nn.Linear(PIXELS, 200), act(), nn.Linear(200, 200), act()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, CLASSES))
    layers = []
    for inner, outer in ((3, 32), (32, 32)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), act(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 8 * 8, CLASSES))


def first_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first training images, standardised pixel by pixel, and their labels."""
    (images, labels), _ = read_folder(folder)
    total, squares = np.zeros((2, *images.shape[1:]))
    for part in np.array_split(images, 10):  # all of it in float64 would be a gigabyte
        part = part / 255
        total += part.sum(0)
        squares += (part * part).sum(0)
    mean = total / len(images)
    deviation = np.sqrt(squares / len(images) - mean * mean)
    shown = (images[:count] / 255 - mean) / deviation
    return torch.from_numpy(shown).float(), torch.from_numpy(labels[:count].astype(np.int64))


def loss_of(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss summed over the images, over their number."""
    if kind == "ce":
        return nn.functional.cross_entropy(outputs, labels, reduction="sum") / len(labels)
    targets = nn.functional.one_hot(labels, CLASSES).float()
    return 0.5 * ((outputs - targets) ** 2).sum() / len(labels)


# --- training, without and with a tracker ---------------------------------------------------------


@dataclass
class Training:
    """A net before its first step."""

    run: Run
    data: tuple[Tensor, Tensor]
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = network(self.run.net)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.run.rate)

    def closure(self) -> Tensor:
        images, labels = self.data
        return loss_of(self.run.loss, self.model(images), labels)

    def losses(self, backward: Callable[[Closure], Tensor]) -> Iterable[tuple[int, float]]:
        """Trains; yields every step's number and loss before its gradient is followed."""
        for step in range(self.run.steps):
            self.optimizer.zero_grad()
            yield step, float(backward(self.closure))
            self.optimizer.step()

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def plain_backward(closure: Closure) -> Tensor:
    loss = closure()
    loss.backward()
    return loss.detach()


def exact_top(
    closure: Closure, parameters: Sequence[Tensor], start: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """Largest eigenvalue of the Hessian and its vector, by Lanczos on exact products."""
    sizes = [p.numel() for p in parameters]
    gradient = torch.autograd.grad(closure(), parameters, create_graph=True)

    def product(vector: np.ndarray) -> np.ndarray:
        parts = torch.as_tensor(vector, dtype=torch.float32).split(sizes)
        parts = [v.view_as(p) for v, p in zip(parts, parameters, strict=True)]
        rows = torch.autograd.grad(gradient, parameters, parts, retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).double().numpy()

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
    (value,), vectors = eigsh(operator, k=1, which="LA", v0=start, ncv=8, tol=1e-3)
    return float(value), vectors[:, 0]


def plain(run: Run, data: tuple[Tensor, Tensor], earlier: Rows) -> tuple[Rows, list[Tensor]]:
    """Rows of step, loss and exact value of a run without a tracker; its last parameters."""
    training = Training(run, data)
    parameters = list(training.model.parameters())
    rows, start = [], None
    for step, loss in training.losses(plain_backward):
        row = {"step": step, "loss": loss, "exact": math.nan}
        # A loss that is another one tells of another trajectory, from here on.
        same = step < len(earlier) and earlier[step]["loss"] == loss
        earlier = earlier if same else []
        if step % EVERY == 0 and same and math.isfinite(earlier[step]["exact"]):
            row["exact"] = earlier[step]["exact"]
        elif step % EVERY == 0:
            row["exact"], start = exact_top(training.closure, parameters, start)
        rows.append(row)
    return rows, training.parameters()


def tracked(
    run: Run, data: tuple[Tensor, Tensor], options: dict[str, Any]
) -> tuple[Rows, list[Tensor]]:
    """Rows of loss and the tracker's values of a run with a tracker; its last parameters."""
    training = Training(run, data)
    tracker = lyapcuda.CurvatureTracker(training.model.parameters(), **options)
    rows, before = [], 0
    for step, loss in training.losses(tracker.backward):
        rho, residual, h = (
            float(value.reshape(-1)[0]) for value in (tracker.rayleigh, tracker.residual, tracker.h)
        )
        row = {"loss": loss, "h": h, "rayleigh": rho, "residual": residual}
        row["schwarz"] = float(tracker.schwarz.reshape(-1)[0])
        row["secant"] = math.copysign(math.hypot(rho, residual), rho)
        error = getattr(tracker, "h_error", None)
        row["h_error"] = math.nan if error is None else float(error.reshape(-1)[0])
        spent = getattr(tracker, "gradients", tracker.k * (step + 1))
        row["gradients"], before = spent - before, spent
        rows.append(row)
    return rows, training.parameters()


def follow(folder: Path, run: Run, modes: dict[str, dict[str, Any]], earlier: Rows) -> Rows:
    """A row a step: the run's own columns, then those of every mode."""
    data = first_images(folder, run.images)
    begin = time.perf_counter()
    rows, parameters = plain(run, data, earlier)
    print(f"{run.name}: exact values {time.perf_counter() - begin:.0f} s", flush=True)
    for label, options in modes.items():
        begin = time.perf_counter()
        values, found = tracked(run, data, options)
        same = all(map(torch.equal, parameters, found))
        same &= all(a["loss"] == b["loss"] for a, b in zip(rows, values, strict=True))
        for row, value in zip(rows, values, strict=True):
            row |= {f"{label}, {name}": v for name, v in value.items() if name != "loss"}
            row[f"{label}, bitwise"] = float(same)
        seconds = time.perf_counter() - begin
        print(f"{run.name}, {label}: {seconds:.0f} s, bitwise {same}", flush=True)
    return rows


# --- CSVs -----------------------------------------------------------------------------------------


def rows_of(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def keep(path: Path, rows: Rows, earlier: Rows) -> None:
    """Writes them, with the columns of other modes if those saw the same losses."""
    if [row["loss"] for row in earlier] == [row["loss"] for row in rows]:
        rows = [old | new for old, new in zip(earlier, rows, strict=True)]
    # The loss in full: it tells trajectories apart.
    texts = [{k: repr(v) if k == "loss" else f"{v:.6g}" for k, v in row.items()} for row in rows]
    lines = [csv_line(text.values()) for text in texts]
    LineFile(path, [csv_line(rows[0]), *lines])


def modes_in(rows: Rows) -> list[str]:
    return [name.removesuffix(", h") for name in rows[0] if name.endswith(", h")]


# --- the report -----------------------------------------------------------------------------------


def crossing(run: Run, rows: Rows) -> int:
    """The first step with an exact value of at least 2/η; after the last, where there is none."""
    return next((i for i, row in enumerate(rows) if row["exact"] >= run.edge), len(rows))


def parts_of(run: Run, rows: Rows) -> dict[str, Rows]:
    """The rows of every part of the run."""
    first = crossing(run, rows)
    near = next((i for i, row in enumerate(rows) if row["exact"] >= BELOW * run.edge), first)
    losses = [row["loss"] for row in rows]
    rise = next((i for i in range(first + 1, len(rows)) if losses[i] > losses[i - 1]), len(rows))
    parts = {"first": rows[:FIRST], "before": rows[FIRST:near], "at": rows[first:]}
    return parts | {"unsteady": rows[rise:]}


def errors(rows: Rows, label: str, what: str) -> list[float]:
    """|tracked/exact − 1| where there is an exact value."""
    name = f"{label}, {what}"
    return [abs(row[name] / row["exact"] - 1) for row in rows if math.isfinite(row["exact"])]


def percent(found: list[float]) -> str:
    if not found:
        return "–"
    return f"{100 * np.median(found):.1f} ({100 * np.quantile(found, 0.9):.1f})"


def covered(rows: Rows, label: str) -> list[bool]:
    """Whether |h − exact| ≤ h_error, where both are there."""
    triples = [(row[f"{label}, h"], row["exact"], row[f"{label}, h_error"]) for row in rows]
    return [abs(h - exact) <= e for h, exact, e in triples if math.isfinite(exact + e)]


HEAD = [
    "| | mode | steps | " + " | ".join(VALUES) + " | gradients a step, most | h_error covers |",
    "|---" * (5 + len(VALUES)) + "|",
]


def line(first: str, label: str, rows: Rows) -> str:
    """A row of the tables: what a mode does in these rows."""
    spent = [row[f"{label}, gradients"] for row in rows]
    inside = covered(rows, label)
    cells = [first, label, str(len(rows))]
    cells += [percent(errors(rows, label, what)) for what in VALUES.values()]
    cells.append(f"{np.mean(spent):.2f}, {max(spent):.0f}" if spent else "–")
    cells.append(f"{100 * np.mean(inside):.0f} % of {len(inside)}" if inside else "–")
    return "| " + " | ".join(cells) + " |"


def lines_of(runs: dict[str, Rows]) -> list[str]:
    """The report: all runs together, then run by run."""
    parts = {name: parts_of(RUNS[name], rows) for name, rows in runs.items()}
    labels = list(dict.fromkeys(label for rows in runs.values() for label in modes_in(rows)))
    lines = ["In %, median (90th percentile) of |tracked/exact − 1|.", "", "## All runs", "", *HEAD]
    for part, title in PARTS.items():
        for label in labels:
            having = [name for name, rows in runs.items() if label in modes_in(rows)]
            together = [row for name in having for row in parts[name][part]]
            lines.append(line(f"{title}, {len(having)} runs", label, together))
    for name, rows in runs.items():
        run, step = RUNS[name], crossing(RUNS[name], rows)
        exact = [row["exact"] for row in rows if math.isfinite(row["exact"])]
        about = f"η = {run.rate}, 2/η = {run.edge:.3g}, {run.images} images, {run.steps} steps; "
        about += f"exact at {len(exact)} of them: {exact[0]:.3g} at first, {max(exact):.3g} at most"
        about += f", 2/η at step {step}. " if step < len(rows) else ", never 2/η. "
        for label in modes_in(rows):
            same = "bitwise as" if rows[0][f"{label}, bitwise"] else "**NOT bitwise as**"
            about += f"Training {same} without a tracker: {label}. "
        lines += ["", f"## {run.net}, {run.loss}", "", about.rstrip(), "", *HEAD]
        for part, title in PARTS.items():
            lines += [line(title, label, parts[name][part]) for label in modes_in(rows)]
    return [*lines, ""]


# --- the picture ----------------------------------------------------------------------------------


def draw(runs: dict[str, Rows], path: Path, modes: Sequence[str] = ()) -> None:
    """Draws exact and tracked values over 2/η and the gradients spent, a panel a run.

    Args:
        runs: the rows of each.
        path: of the picture.
        modes: which, the last on top; none: all that the runs have.
    """
    import matplotlib.pyplot as plt  # the report does without

    figure = plt.figure(figsize=(11.0, 7.0), layout="constrained")
    panels, entries = figure.subfigures(2, 3).T.reshape(-1), {}
    for panel, (name, rows) in zip(panels, runs.items(), strict=False):
        run, step = RUNS[name], [row["step"] for row in rows]
        top, bottom = panel.subplots(2, sharex=True, height_ratios=[3, 1])
        labels = [label for label in modes or modes_in(rows) if label in modes_in(rows)]
        for i, label in enumerate(labels):
            color = f"C{i}"
            top.plot(step, [row[f"{label}, h"] for row in rows], color=color, lw=1.1, label=label)
            bottom.step(step, [row[f"{label}, gradients"] for row in rows], color=color, lw=0.9)
        points = [(row["step"], row["exact"]) for row in rows if math.isfinite(row["exact"])]
        top.plot(*zip(*points, strict=True), "k.", ms=3.5, label="exact (Lanczos)")
        top.axhline(run.edge, color="C3", ls="--", lw=1.1, label="2/η")
        top.set_title(f"{run.net}, {run.loss}, η = {run.rate}", fontsize=10)
        top.set(ylim=(0, 1.15 * max(value for _, value in points)))
        bottom.set(ylim=(0, None), xlim=(0, run.steps), xlabel="training step")
        bottom.yaxis.get_major_locator().set_params(integer=True)
        if panel in panels[:2]:
            top.set_ylabel("largest eigenvalue")
            bottom.set_ylabel("gradients\nbeside θ's")
        entries = entries | dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        entries.values(), entries, ncols=len(entries), frameon=False, loc="outside upper center"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- the command line -----------------------------------------------------------------------------


def measure(folder: Path | None, names: Sequence[str], modes: dict[str, dict[str, Any]]) -> None:
    """Trains the runs of these names and writes their CSVs; without a folder does nothing."""
    for name in names if folder else ():
        run, earlier = RUNS[name], rows_of(RUNS[name].path)
        keep(run.path, follow(folder, run, modes, earlier), earlier)


def measured() -> dict[str, Rows]:
    """What the CSVs hold, by run."""
    return {name: rows for name, run in RUNS.items() if (rows := rows_of(run.path))}


def lines() -> list[str]:
    """The report on the CSVs."""
    return lines_of(measured())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", type=Path, help="none: CSVs as they are"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--modes", nargs="+", default=[DEFAULT], metavar="MODE")
    parser.add_argument("--draw", nargs="+", default=[], metavar="MODE", help="not all of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    modes = modes_of(arguments.modes)
    measure(arguments.folder, arguments.runs, modes)
    report("tracking_edge", "Tracked h0 at the edge of stability", __doc__, lines())
    draw(measured(), PICTURE, arguments.draw)


if __name__ == "__main__":
    main()
