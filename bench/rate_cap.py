"""What a cap on the learning rate costs, and what it saves: RateCap over rates that diverge or not.

    python bench/rate_cap.py [--models MODEL ...] [--warm N ...]

scikit-learn's digits, the MLP and LeNet-1 of examples/paper (ReLU), cross-entropy, 200 steps of 128
pictures, two seeds. SGD, SGD with momentum 0.9 and Adam at several constant base rates, without a
cap and with `RateCap(optimizer, tracker, c)` for c = 0.5, 1 and 2 thresholds. All runs of a seed
start from the same parameters and see the same minibatches. With "10 measurements before" the
tracker has seen the first minibatch ten times before the first step (SGD alone: Adam has no P by
then), so that q isn't random any more when the cap begins.

Cells: the mean over the last 20 minibatches and both seeds; "diverged": a loss of some seed isn't
finite, or ends above twice the first one; then in brackets the median factor that the base rate was
multiplied with, where it isn't 1. A capped step costs one gradient more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lyapcuda import CurvatureTracker, RateCap

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.paper.data import BatchLoader, Dataset, load  # noqa: E402
from examples.paper.models import build  # noqa: E402
from tracking_cost import RESULTS, report  # noqa: E402

MODELS = {"mlp": "MLP", "lenet1": "LeNet-1"}
STEPS, BATCH, SEEDS, WINDOW = 200, 128, 2, 20
#: Optimizer → how it is made, its base rates.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], tuple[float, ...]]] = {
    "SGD": (SGD, (0.3, 1.0, 3.0, 10.0)),
    "SGD, m = 0.9": (lambda p, lr: SGD(p, lr=lr, momentum=0.9), (0.1, 0.3, 1.0)),
    "Adam": (Adam, (1e-2, 1e-1)),
}
CAPS = (None, 0.5, 1.0, 2.0)
WARM = (0, 10)
JSON = RESULTS / "rate_cap.json"

#: Loss after the run (inf: diverged), the median factor.
Result = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    model: str
    optimizer: str
    rate: float
    c: float | None
    warm: int = 0  # measurements before the first step

    @property
    def name(self) -> str:
        return f"{self.model}, {self.optimizer}, {self.rate:g}, {self.c}, {self.warm}"


def run(dataset: Dataset, setting: Setting, seed: int) -> Result:
    torch.manual_seed(seed)
    net = build(setting.model, dataset.in_channels, dataset.image_size, len(dataset.classes))
    trained = OPTIMIZERS[setting.optimizer][0](net.parameters(), lr=setting.rate)
    tracker = cap = None
    if setting.c is not None:
        tracker = CurvatureTracker(net.parameters(), optimizer=trained)
        cap = RateCap(trained, tracker, setting.c)
    loader, losses, factors = BatchLoader(dataset, BATCH, seed), [], []
    for step in range(STEPS):
        images, labels = loader.next()

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            return nn.functional.cross_entropy(net(images), labels)

        for _ in range(0 if step or tracker is None else setting.warm):
            tracker.step(closure)
        trained.zero_grad()
        if tracker is None:
            loss = closure()
            loss.backward()
        else:
            loss = tracker.backward(closure)
        trained.step()
        losses.append(float(loss.detach()))
        factors.append(1.0 if cap is None else float(cap.factor))
        if not math.isfinite(losses[-1]):
            break
    mean = statistics.fmean(losses[-WINDOW:])
    diverged = not math.isfinite(mean) or mean > 2 * losses[0]
    return math.inf if diverged else mean, statistics.median(factors)


def cell(results: list[Result]) -> str:
    loss = statistics.fmean(loss for loss, _ in results)
    factor = statistics.fmean(factor for _, factor in results)
    text = f"{loss:.3g}" if math.isfinite(loss) else "diverged"
    return text if factor == 1 else f"{text} ({factor:.2g})"


def settings(model: str, warm: int) -> Iterator[list[Setting]]:
    """Those of every row: without a cap, and with each."""
    for optimizer, (_, rates) in OPTIMIZERS.items():
        for rate in rates if warm == 0 or optimizer != "Adam" else ():
            yield [Setting(model, optimizer, rate, c, warm if c else 0) for c in CAPS]


def lines_of(found: dict[str, list[Result]]) -> list[str]:
    lines = []
    for warm in WARM:
        heads = ["model", "optimizer", "rate", "no cap", *(f"c = {c:g}" for c in CAPS[1:])]
        rows = [
            f"| {MODELS[model]} | {row[0].optimizer} | {row[0].rate:g} | "
            f"{' | '.join(cell(found[setting.name]) for setting in row)} |"
            for model in MODELS
            for row in settings(model, warm)
            if all(setting.name in found for setting in row)
        ]
        title = f"## {warm} measurements before" if warm else "## None before"
        lines += [title, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--warm", nargs="+", type=int, choices=WARM, default=list(WARM))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load("digits")
    found = json.loads(JSON.read_text()) if JSON.exists() else {}
    for model in arguments.models:
        for warm in arguments.warm:
            for setting in chain.from_iterable(settings(model, warm)):
                if setting.c is None and warm != arguments.warm[0]:
                    continue  # the same run
                found[setting.name] = [run(dataset, setting, seed) for seed in range(SEEDS)]
                print(setting.name, cell(found[setting.name]), flush=True)
                JSON.write_text(json.dumps(found, indent=1) + "\n")
    report("rate_cap", "What a cap on the learning rate costs", __doc__, lines_of(found))


if __name__ == "__main__":
    main()
