"""Whether torch code in place of an op would give the same bits everywhere, as the ops do.

    python bench/torch_bits.py [--out bench/results/torch_bits.md]

Each piece of torch code runs on the same numbers by 1 and 2 threads, with ATen's and MKL's
instruction sets of three generations of processors, in a process each.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ops import cpu_name

#: Of ATen, and of MKL.
SETS = (("default", "SSE4_2"), ("avx2", "AVX2"), ("avx512", "AVX512"))
THREADS = (1, 2)
N = 1_000_003


def digests(threads: int) -> dict[str, str]:
    """What each piece of torch code makes of the same numbers."""
    torch.set_num_threads(threads)
    draw = np.random.default_rng(0)  # torch's own draws follow the instruction set

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))

    theta, u, rate = normal(N), normal(N), 0.0123
    stepped, options = theta.clone(), {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
    torch._fused_sgd_(
        [stepped], [u], [], lr=rate, weight_decay=0.1, maximize=False, is_first_step=False,
        **options,
    )  # fmt: skip
    found = {
        "`descend_`: `theta.sub_(u, alpha=lr)`": theta.clone().sub_(u, alpha=rate),
        "`descend_`: `torch._fused_sgd_`": stepped,
        "`recenter_`, k = 1: `torch.add(theta, q, alpha=scale)`": theta.add(u, alpha=0.37),
        "`difference_`: `torch.sub(plus, minus)`": theta - u,
        "`difference_`, weight decay: `add_(theta, alpha=decay)`": (theta - u).add_(u, alpha=0.1),
    }
    for k in (4, 14, 32):
        matrix, a, b = normal(k, k), normal(k, N // 5), normal(k, N // 5)
        name = "`combine_` and `recenter_`, k = {}: `torch.mm(matrix.t(), d)`"
        found[name.format(k)] = torch.mm(matrix.t(), a)
        found[f"`gram`, k = {k}: `torch.mm(a, b.t())` in float64"] = a.double() @ b.double().t()
    whole = {name: tensor.numpy().tobytes() for name, tensor in found.items()}
    return {name: hashlib.sha256(these).hexdigest() for name, these in whole.items()}


def of_process(threads: int, aten: str, mkl: str) -> dict[str, str]:
    environment = {"ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl}
    command = [sys.executable, __file__, "--digests", str(threads)]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def report() -> Sequence[str]:
    """The lines of the report."""
    runs = {(t, *s): of_process(t, *s) for t, s in itertools.product(THREADS, SETS)}
    machine = f"Machine: {cpu_name()}, torch {torch.__version__}."
    lines = ["# Torch code in place of an op: the same bits?", ""]
    lines += [f"{machine} `python bench/torch_bits.py`.", ""]
    lines += [
        "| torch code | with any number of threads | with any instruction set |",
        "|---|---|---|",
    ]
    for name in next(iter(runs.values())):
        of_threads = all(len({runs[(t, *s)][name] for t in THREADS}) == 1 for s in SETS)
        of_sets = all(len({runs[(t, *s)][name] for s in SETS}) == 1 for t in THREADS)
        lines.append(f"| {name} | {'yes' if of_threads else 'no'} | {'yes' if of_sets else 'no'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digests", type=int, metavar="THREADS", help="of one process, as JSON")
    parser.add_argument("--out", type=Path, help="write the report there")
    options = parser.parse_args()
    if options.digests:
        return print(json.dumps(digests(options.digests)))
    text = "\n".join(report()) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
