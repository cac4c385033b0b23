"""nanoGPT's own model in its kind of training, tracked: h0 beside eigsh's, and the same training.

    python bench/tracking/nanogpt.py [--nanogpt FOLDER] [--modes default tol=0.1,iterations=8]

FOLDER has nanoGPT's model.py (github.com/karpathy/nanoGPT, MIT); without it, bench/gpt.py's GPT
with dropout between its blocks stands in. 4 blocks of width 128, 4 heads, 64 characters of Python's
help, dropout 0.2; AdamW at 1e-3, two micro-batches of 4 accumulated, gradients clipped to norm 1;
150 steps, in float32 and under bfloat16 autocast. Two ways to track:
- "closure": `tracker.backward(closure)`, where the closure calls backward() for each micro-batch;
- "batches": `tracker.backward(loss_of, batches=[first, second])`: the curvature of the second.

Each mode trains anew, and has to end at the parameters of the plain run, bit by bit: the script
fails otherwise. Beside h at steps 10, 20, 50, 100 and 149 stands `lyapcuda.eigsh` of what was
measured, at the same θ, of the same characters and with the same dropout masks. Under autocast
eigsh's own value is rounded as the gradients are, and called unconverged; "beside float32" compares
with eigsh of the same loss without autocast.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import lyapcuda  # noqa: E402
from gpt import GPT  # noqa: E402
from tracking.readings import (  # noqa: E402
    DEFAULT,
    RESULTS,
    Modes,
    Row,
    coverage,
    keep,
    known,
    load,
    modes_of,
    read,
    recall,
    spent,
    table,
)
from tracking.text import characters, pieces  # noqa: E402

CSV = RESULTS / "tracking_nanogpt.csv"
SEED, STEPS, POINTS = 11, 150, (10, 20, 50, 100, 149)
RATE, BATCH, LENGTH, WIDTH, HEADS, DEPTH, DROPOUT = 1e-3, 4, 64, 128, 4, 4, 0.2
WAYS = ("closure", "batches")
PRECISIONS = ("float32", "bfloat16")
#: What the error should not exceed at any of these steps.
GOAL, JUDGED = 0.2, (10, 50, 100, 149)

Micro = list[Tensor]


def model_of(folder: Path | None, vocabulary: int) -> nn.Module:
    """Maps (batch, length) tokens to logits, or nanoGPT's with targets to (logits, loss)."""
    if folder is None:
        model = GPT(vocabulary, LENGTH, WIDTH, HEADS, DEPTH)
        with_dropout = (part for block in model.blocks for part in (block, nn.Dropout(DROPOUT)))
        model.blocks = nn.Sequential(*with_dropout)
        return model
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"n_layer": DEPTH, "n_head": HEADS, "n_embd": WIDTH, "dropout": DROPOUT}
    config = module.GPTConfig(block_size=LENGTH, vocab_size=vocabulary, **shape)
    with redirect_stdout(sys.stderr):  # it says how many parameters it has
        return module.GPT(config)


@dataclass(frozen=True)
class State:
    """What a step began with."""

    loss: Tensor
    parameters: list[Tensor]
    random: Tensor
    batches: Micro


class Training:
    """A training from its beginning: the same one, plain or tracked."""

    def __init__(self, folder: Path | None, autocast: bool) -> None:
        self.autocast = autocast
        text, vocabulary = characters()
        torch.manual_seed(SEED)
        self.model = model_of(folder, vocabulary)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE)
        self._pieces = pieces(text, BATCH, LENGTH, SEED)

    def loss_of(self, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if isinstance(self.model, GPT):
                logits = self.model(inputs).flatten(0, 1)
                return nn.functional.cross_entropy(logits, targets.flatten())
            return self.model(inputs, targets)[1]

    def accumulated(self, batches: Micro, *, backward: bool = True) -> Tensor:
        """The mean loss; ``backward``: as nanoGPT's loop has it, of one micro-batch at a time."""
        total = torch.zeros(())
        for batch in batches:
            loss = self.loss_of(batch) / len(batches)
            if backward:
                loss.backward()
                loss = loss.detach()
            total = total + loss
        return total

    def run(self, gradient: Callable[[int, Micro], None]) -> list[Tensor]:
        """Trains; ``gradient`` adds it to ``.grad``. Returns the parameters at the end."""
        for step in range(STEPS):
            self.optimizer.zero_grad(set_to_none=True)
            gradient(step, [next(self._pieces) for _ in range(2)])
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        return [p.detach().clone() for p in self.parameters]

    def plain(self) -> tuple[list[Tensor], dict[int, State]]:
        """The parameters at the end, and what the steps began with where there is to measure."""
        states = {}

        def gradient(step: int, batches: Micro) -> None:
            random = torch.get_rng_state()
            kept = [p.detach().clone() for p in self.parameters] if step in POINTS else []
            loss = self.accumulated(batches)
            if step in POINTS:
                states[step] = State(loss, kept, random, batches)

        return self.run(gradient), states

    def exact(self, state: State, way: str, *, autocast: bool) -> float:
        """What eigsh says of what is measured there."""
        self.autocast = autocast
        with torch.no_grad():
            for p, value in zip(self.parameters, state.parameters, strict=True):
                p.copy_(value)
        torch.set_rng_state(state.random)
        if way == "closure":
            result = lyapcuda.eigsh(
                lambda: self.accumulated(state.batches, backward=False),
                self.parameters,
                model=self.model,
            )
        else:
            self.loss_of(state.batches[0])  # the second one's masks come after the first one's
            result = lyapcuda.eigsh(
                lambda: self.loss_of(state.batches[1]), self.parameters, model=self.model
            )
        print(
            f"eigsh: {float(result.eigenvalues[0]):.5g}, mode {result.mode}, "
            f"converged {bool(result.converged[0])}, residual {float(result.residuals[0]):.2g}",
            file=sys.stderr,
            flush=True,
        )
        return float(result.eigenvalues[0])


def track(folder: Path | None, precision: str, ways: list[str], modes: Modes) -> list[Row]:
    """The plain run, then a tracked one a way and mode: a row at each of POINTS.

    Raises:
        AssertionError: a tracked run ended elsewhere than the plain one.
    """
    autocast = precision != "float32"
    model = "stand-in" if folder is None else "nanoGPT"
    training, found, rows = Training(folder, autocast), known(CSV), []
    end, states = training.plain()
    for way in ways:
        title = f"{model}, {precision}, {way}"
        truths = {title: autocast} | ({f"{title}, beside float32": False} if autocast else {})
        exact = {
            (run, step): recall(found, run, step, state.loss)
            or [training.exact(state, way, autocast=coarse)]
            for run, coarse in truths.items()
            for step, state in states.items()
        }
        for mode, options in modes.items():
            tracked = Training(folder, autocast)
            tracker = lyapcuda.CurvatureTracker(tracked.parameters, model=tracked.model, **options)

            def gradient(step: int, batches: Micro, here=(mode, tracked, tracker)) -> None:
                mode, tracked, tracker = here
                if way == "closure":  # noqa: B023  (called within this turn of the loop)
                    tracker.backward(lambda: tracked.accumulated(batches))
                else:
                    tracker.backward(tracked.loss_of, batches=batches)
                if step in POINTS:
                    for run in truths:  # noqa: B023
                        loss, value = states[step].loss, exact[run, step]  # noqa: B023
                        rows.extend(read(tracker, run, mode, step, loss, value))

            same = zip(tracked.run(gradient), end, strict=True)
            assert all(torch.equal(a, b) for a, b in same), f"{title}, {mode}: another training"
    return rows


def report(rows: list[Row]) -> list[str]:
    lines = []
    for run, mode in dict.fromkeys((row.run, row.mode) for row in rows):
        mine = sorted((r for r in rows if (r.run, r.mode) == (run, mode)), key=lambda r: r.step)
        cells = [f"{r.exact:.3g}: {r.h:.3g}, {r.schwarz:.3g}, {r.secant:.3g}" for r in mine]
        judged = [row for row in mine if row.step in JUDGED]
        worst = [max(row.off(name) for row in judged) for name in ("h", "schwarz", "secant")]
        cells += [", ".join(f"{x:.0%}" for x in worst), coverage(mine), spent(mine)]
        lines.append(f"| {run} | {mode} | {' | '.join(cells)} |")
    steps = " | ".join(f"step {step}" for step in POINTS)
    head = f"run | mode | {steps} | largest errors | h_error holds it | gradients a step"
    about = "In the cells: eigsh: h, Schwarz quotient, secant; then the largest error of each at "
    about += f"steps {', '.join(map(str, JUDGED))} (goal: {GOAL:.0%}). The tracked runs ended at "
    about += "the plain run's bits."
    return [about, "", *table(head, lines)]


def measured(
    folder: Path | None = None,
    modes: Modes | None = None,
    precisions: list[str] | None = None,
    ways: list[str] | None = None,
    *,
    again: bool = True,
) -> list[str]:
    """Trains and writes the CSV (``again=False``: only reads it); the report's lines.

    Args:
        folder: with nanoGPT's model.py; None for the stand-in.
        modes: trackers' options; default: one with none.
        precisions, ways: of PRECISIONS and WAYS; default: all.
    """
    for precision in precisions or PRECISIONS if again else ():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lyapcuda.ConvergenceWarning)  # printed beside the value
            keep(CSV, track(folder, precision, ways or list(WAYS), modes or modes_of()))
    return report([row for row in load(CSV) if math.isfinite(row.exact)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="with nanoGPT's model.py")
    parser.add_argument("--modes", nargs="+", metavar="MODE", default=[DEFAULT])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--report", action="store_true", help="on the CSV again, without training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    modes, again = modes_of(arguments.modes), not arguments.report
    chosen = (arguments.precisions, arguments.ways)
    print("\n".join(measured(arguments.nanogpt, modes, *chosen, again=again)))


if __name__ == "__main__":
    main()
