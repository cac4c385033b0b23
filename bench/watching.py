"""Whether measuring curvature beside training changes any bit of it, on runs drawn at random.

    python bench/watching.py                           # 300 draws: a table by kind, the failures
    python bench/watching.py --draws 5000 --seed 1000  # others
    python bench/watching.py --slow                    # three times the steps of each
    python bench/watching.py --show 17                 # one draw, and where its two runs part

A draw (`tests/support/watched_training.py`) is a small net, a loop (optimizer, closure,
accumulation, clipping, AMP, scheduler, average of the weights, hooks, metrics) and a way to
measure. Each is run with and without measurements, in one process, on one thread. Compared are the
bits of parameters, gradients, buffers, plain attributes, losses, random states, and the states of
optimizers, schedulers, scalers, metrics and averages. Exits with 1 where a draw failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from watched_training import STEPS, Draw, differences, draw, kinds, train  # noqa: E402


def parted(drawn: Draw, steps: int) -> list[str]:
    """What a watched run leaves differently from a plain one: names, or the error that came."""
    plain = train(drawn, False, steps)
    try:
        return differences(plain, train(drawn, True, steps))
    except Exception as error:  # any: it stopped a run that was right without us
        return [f"{type(error).__name__}: {error}"]


def show(seed: int, steps: int) -> bool:
    """Prints a draw and the first step after which its two runs differ."""
    drawn = draw(seed)
    print(f"draw {seed}", *kinds(drawn), sep="\n  ")
    for count in range(1, steps + 1):
        names = parted(drawn, count)
        if names:
            print(f"after {count} of {steps} steps:", *names, sep="\n  ")
            return False
    print(f"the same bits after {steps} steps")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first draw's number")
    parser.add_argument("--slow", action="store_true", help=f"{3 * STEPS} steps, not {STEPS}")
    parser.add_argument("--show", type=int, metavar="SEED", help="one draw in full")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = 3 * STEPS if arguments.slow else STEPS
    if arguments.show is not None:
        return int(not show(arguments.show, steps))

    start, drawn_of, failed_of = time.perf_counter(), Counter(), Counter()
    failures: list[str] = []
    for seed in range(arguments.seed, arguments.seed + arguments.draws):
        drawn = draw(seed)
        names = parted(drawn, steps)
        drawn_of.update(kinds(drawn))
        if names:
            failed_of.update(kinds(drawn))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            failures.append(f"{seed} ({drawn.scene}; {drawn.way}): {', '.join(names[:3])}{more}")
    print("| kind | draws | failed |\n|---|---|---|")
    for kind in sorted(drawn_of):
        print(f"| {kind} | {drawn_of[kind]} | {failed_of[kind]} |")
    print("", *failures, sep="\n")
    seconds = time.perf_counter() - start
    print(f"{arguments.draws} draws of {steps} steps: {len(failures)} failed; {seconds:.0f} s")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
